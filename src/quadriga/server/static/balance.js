// How evenly a layer's experts are used. Pure arithmetic over counts; the server computes the same two numbers.

export const sum = (counts) => counts.reduce((total, n) => total + n, 0);

/** Largest load over mean load: 1 is perfect, the number of experts is collapse; 1 before the first token. */
export function maxOverMean(counts) {
  const total = sum(counts);
  return total ? (Math.max(...counts) * counts.length) / total : 1;
}

/** Jain's index (sum x)^2 / (n sum x^2): 1 is perfect, 1/n is collapse; 1 before the first token. */
export function jain(counts) {
  const total = sum(counts);
  return total ? total ** 2 / (counts.length * sum(counts.map((n) => n * n))) : 1;
}

const ENOUGH = 10;

/**
 * True for an expert that nobody chose although an even router would have done so ten times: with k of E chosen at
 * random its odds were below e^-10. Before that a zero says nothing.
 */
export function isDead(counts, expert) {
  return counts[expert] === 0 && sum(counts) / counts.length >= ENOUGH;
}

export function mean(values) {
  return values.length ? sum(values) / values.length : 0;
}

/** Counts now minus counts then. */
export function difference(now, then) {
  return now.map((layer, i) => layer.map((n, j) => n - then[i][j]));
}
