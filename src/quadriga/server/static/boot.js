// Runs before the first paint, so that nobody who chose dark sees a white flash. Everything else is in modules.
(() => {
  let choice = "system";
  try {
    choice = JSON.parse(localStorage.getItem("quadriga.settings") || "{}").theme || "system";
  } catch {
    // No storage or a broken entry: the system's theme it is.
  }
  const dark = choice === "dark" || (choice === "system" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
})();
