"""Files: texts and PDFs that go with a message, conversations that come from and go to other programs."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.server.page.conftest import LAST, Open, Tab, file_of_version_1

CODE = "def double(x):\n    return 2 * x  # ``` even with fences\n"


def attach(tab: Tab, name: str, content: bytes) -> None:
    tab.page.set_input_files("#attach", {"name": name, "mimeType": "", "buffer": content})


def test_files_go_with_a_message_and_stay_with_it(visit: Open) -> None:
    tab = visit()
    bodies = tab.answers("A function.", "Again.")
    attach(tab, "double.py", CODE.replace("\n", "\r\n").encode())
    attach(tab, "notes.txt", "第一行\n".encode("utf-16"))
    tab.page.wait_for_selector(".attached li:nth-child(2)")
    assert "double.py" in tab.texts(".attached li")[0] and "3 lines" in tab.texts(".attached li")[0]
    tab.send("What is this?")
    fenced = "double.py\n````\n" + CODE + "````\n\nnotes.txt\n```\n第一行\n```\n\nWhat is this?"
    assert bodies[0]["messages"] == [{"role": "user", "content": fenced}]
    assert tab.texts(".said") == ["What is this?"] and tab.count(".attached") == 0
    assert tab.texts(".file summary b") == ["double.py", "notes.txt"]
    assert not tab.page.locator(".file pre").first.is_visible()
    tab.page.locator(".file summary").first.click()
    assert tab.page.locator(".file pre").first.inner_text() == CODE
    tab.page.locator(".message.user button[aria-label=Edit]").click()
    tab.page.fill(".editor textarea", "And this?")
    tab.page.press(".editor textarea", "Enter")
    tab.done()
    assert bodies[1]["messages"][0]["content"] == fenced.replace("What is this?", "And this?")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("picture.png", b"\x89PNG\r\n\x1a\n\0\0\0", "is no text"),
        ("broken.txt", b"caf\xe9 au lait", "is no text"),
        ("empty.txt", b"  \n", "has no text in it"),
        ("locked.pdf", b"%PDF-1.7\ntrailer << /Encrypt 5 0 R >>", "is encrypted"),
        ("scan.pdf", b"%PDF-1.7\n1 0 obj << /Type /Catalog >> endobj", "has no text in it"),
        ("huge.txt", b"a" * 2_000_001, "too large"),
    ],
)
def test_what_has_no_text_is_refused_by_name(visit: Open, name: str, content: bytes, said: str) -> None:
    tab = visit()
    attach(tab, name, content)
    tab.page.wait_for_selector(f".toast:has-text('{said}')")
    assert name in tab.texts(".toast")[0] and tab.count(".attached") == 0


def stream(content: bytes, extra: str = "") -> bytes:
    packed = zlib.compress(content)
    return b"<< /Length %d /Filter /FlateDecode %s >>\nstream\n%s\nendstream" % (len(packed), extra.encode(), packed)


def pdf(objects: dict[int, bytes]) -> bytes:
    body = b"".join(b"%d 0 obj\n%s\nendobj\n" % (number, content) for number, content in objects.items())
    return b"%PDF-1.5\n%\xe2\xe3\xcf\xd3\n" + body + b"trailer << /Root 1 0 R >>\n%%EOF\n"


TWO_PAGES = pdf(
    {
        1: b"<< /Type /Catalog /Pages 2 0 R >>",
        2: b"<< /Type /Pages /Kids [3 0 R 4 0 R] /Count 2 /Resources << /Font << /F1 7 0 R /F2 8 0 R >> >> >>",
        3: b"<< /Type /Page /Parent 2 0 R /Contents [5 0 R] >>",
        4: b"<< /Type /Page /Parent 2 0 R /Contents 6 0 R >>",
        5: stream(
            rb"BT /F1 12 Tf 72 700 Td (Four \(4\) hor) Tj (ses\056) Tj 0 -14 Td [(ker) 30 (ned) -400 (words)] TJ "
            rb"0 -40 Td (A new paragraph) Tj ET BI /W 1 ID (not text) EI BT /F1 12 Tf 72 600 Td (Last \223line\224) Tj ET"
        ),
        6: stream(b"BT /F2 10 Tf 1 0 0 1 72 700 Tm <00010002> Tj 1 0 0 1 92.5 700 Tm <0003> Tj ET"),
        7: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        8: b"<< /Type /Font /Subtype /Type0 /ToUnicode 9 0 R /DescendantFonts [10 0 R] >>",
        9: stream(b"1 beginbfchar <0001> <56DB> endbfchar 1 beginbfrange <0002> <0003> <9A6C> endbfrange"),
        11: stream(b"10 0 << /DW 1000 /W [1 [1000 1000] 3 9 500] >>", "/Type /ObjStm /N 1 /First 5"),
    }
)


def test_the_text_of_a_pdf_is_read_line_by_line(visit: Open) -> None:
    tab = visit()
    bodies = tab.answers("Read.")
    attach(tab, "two.pdf", TWO_PAGES)
    tab.page.wait_for_selector(".attached li")
    tab.send("Summarise")
    text = "Four (4) horses.\nkerned words\n\nA new paragraph\n\nLast “line”\n\n四马驭"
    lines = bodies[0]["messages"][0]["content"].split("```")[1].strip()
    assert lines == text


def test_a_pdf_that_a_browser_printed_is_read(visit: Open) -> None:
    tab = visit()
    printer = tab.page.context.new_page()
    printer.set_content("<h1>Quarterly report</h1><p>Revenue rose by 12 % in <i>each</i> region.</p><p>Costs fell.</p>")
    printed = printer.pdf()
    printer.close()
    bodies = tab.answers("Read.")
    attach(tab, "report.pdf", printed)
    tab.page.wait_for_selector(".attached li")
    tab.send("Summarise")
    text = bodies[0]["messages"][0]["content"]
    assert "Quarterly report\n" in text and "Revenue rose by 12 % in each region.\n" in text and "Costs fell." in text


def paste(tab: Tab, text: str) -> None:
    tab.page.focus("#composer")
    tab.page.evaluate(
        """(text) => {
            const data = new DataTransfer();
            data.setData("text/plain", text);
            const event = new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
            if (document.activeElement.dispatchEvent(event)) document.execCommand("insertText", false, text);
        }""",
        text,
    )


def test_a_long_paste_is_folded_and_a_short_one_is_typed(visit: Open) -> None:
    tab = visit()
    bodies = tab.answers("Yes.")
    paste(tab, "short")
    assert tab.page.input_value("#composer") == "short" and tab.count(".attached") == 0
    log = "\n".join(f"line {i}" for i in range(100))
    paste(tab, log)
    assert tab.page.input_value("#composer") == "short" and "100 lines" in tab.texts(".attached li")[0]
    paste(tab, log)
    tab.page.click(".attached li:nth-child(2) button")
    assert tab.count(".attached li") == 1
    tab.page.press("#composer", "Enter")
    tab.done()
    assert bodies[0]["messages"][0]["content"] == f"Pasted text 1\n```\n{log}\n```\n\nshort"


def test_a_long_message_is_shown_by_its_beginning(visit: Open) -> None:
    tab = visit()
    tab.answers("Yes.")
    tab.send("\n".join(f"row {i}" for i in range(60)))
    assert "row 11" in tab.texts(".said")[0] and "row 12" not in tab.texts(".said")[0]
    tab.page.click(".said .more")
    assert "row 59" in tab.texts(".said")[0]


# Conversations of other programs --------------------------------------------------------------------------------------

CHATGPT = [
    {
        "title": "Horses",
        "create_time": 1700000000.5,
        "update_time": 1700000100.0,
        "current_node": "d",
        "mapping": {
            "root": {"id": "root", "message": None, "parent": None, "children": ["s"]},
            "s": {
                "message": {"author": {"role": "system"}, "content": {"content_type": "text", "parts": ["Be brief."]}},
                "parent": "root",
            },
            "a": {"message": {"author": {"role": "user"}, "content": {"parts": ["How many horses?"]}}, "parent": "s"},
            "t": {"message": {"author": {"role": "tool"}, "content": {"parts": ["searching"]}}, "parent": "a"},
            "b": {"message": {"author": {"role": "assistant"}, "content": {"parts": ["Three."]}}, "parent": "a"},
            "d": {
                "message": {
                    "author": {"role": "assistant"},
                    "content": {"parts": ["Four.", {"content_type": "image_asset_pointer"}]},
                    "metadata": {"model_slug": "gpt-4o"},
                },
                "parent": "t",
            },
        },
    }
]
OPEN_WEBUI = [
    {
        "id": "x",
        "title": "outer",
        "created_at": 1700000000,
        "updated_at": 1700000100,
        "chat": {
            "title": "Colours",
            "history": {
                "currentId": "2",
                "messages": {
                    "1": {"id": "1", "parentId": None, "role": "user", "content": "Which colour?"},
                    "2": {
                        "id": "2",
                        "parentId": "1",
                        "role": "assistant",
                        "model": "qwen3:4b",
                        "content": '<details type="reasoning" done="true" duration="3">\n<summary>Thought for 3 seconds</summary>\n'
                        "&gt; Hm.\n&gt; Green?\n</details>\nGreen.",
                    },
                },
            },
        },
    }
]


def bring(tab: Tab, content: Any) -> None:
    tab.page.set_input_files(
        "#import", {"name": "x.json", "mimeType": "application/json", "buffer": json.dumps(content).encode()}
    )
    tab.page.wait_for_selector(".toast")


def test_conversations_of_chatgpt_come_with_their_branches(visit: Open) -> None:
    tab = visit()
    bring(tab, CHATGPT)
    tab.page.click(".row .open")
    assert tab.texts(".said") == ["How many horses?"] and tab.texts(".prose") == ["Four."]
    assert tab.texts(".message.assistant .branches") == ["2 / 2"]
    (one,) = tab.saved()
    assert (one["title"], one["system"], one["created"]) == ("Horses", "Be brief.", 1700000000500)
    assert {node["content"]: node.get("model") for node in one["nodes"].values()} == {
        "How many horses?": None, "Three.": "", "Four.": "gpt-4o",
    }  # fmt: skip
    bodies = tab.answers("Yes.")
    tab.send("Sure?")
    assert [m["content"] for m in bodies[0]["messages"]] == ["Be brief.", "How many horses?", "Four.", "Sure?"]


def test_conversations_of_open_webui_come_with_their_thoughts(visit: Open) -> None:
    tab = visit()
    bring(tab, OPEN_WEBUI)
    tab.page.click(".row:has-text('Colours') .open")
    assert tab.texts(f"{LAST} > .prose") == ["Green."] and tab.count(f"{LAST} .thought") == 1
    (one,) = tab.saved()
    (given,) = [node for node in one["nodes"].values() if node["role"] == "assistant"]
    assert given["reasoning"] == "Hm.\nGreen?" and given["model"] == "qwen3:4b"


@pytest.mark.parametrize(
    "content",
    [
        [
            {
                "mapping": {"a": {"parent": "b", "message": None}, "b": {"parent": "a", "message": None}},
                "current_node": "a",
            }
        ],
        [{"mapping": {"a": {"parent": "a", "message": {"author": {"role": "user"}, "content": {"parts": ["round"]}}}}}],
        [{"mapping": {"__proto__": None, "a": None}}],
    ],
    ids=["circle", "own parent", "nothing"],
)
def test_mappings_that_are_no_trees_do_no_harm(visit: Open, content: Any) -> None:
    tab = visit()
    bring(tab, content)
    assert tab.count(".row") == 0
    tab.answers("Fine.")
    tab.page.keyboard.press("Alt+KeyN")
    tab.send("Still there?")
    assert tab.texts(".prose") == ["Fine."]


def download(tab: Tab, selector: str, folder: Path) -> str:
    with tab.page.expect_download() as found:
        tab.page.click(selector)
    file = folder / found.value.suggested_filename
    found.value.save_as(file)
    return f"{file.name}\n{file.read_text()}"


def test_one_conversation_goes_as_markdown_and_as_openai_messages(visit: Open, tmp_path: Path) -> None:
    tab = visit({"system": "Be brief."})
    tab.answers("It is **green**.", "Blue.")
    tab.send("Which colour?")
    tab.page.click(f"{LAST} button[aria-label='Another answer']")
    tab.until("document.querySelector('.prose')?.textContent.includes('Blue')")
    tab.done()
    tab.page.hover(".row")
    tab.page.click(".row button[aria-label='Folder and files']")
    markdown = download(tab, "[data-format=markdown]", tmp_path)
    name, title, *_ = markdown.split("\n")
    assert name == "Which-colour.md" and title == "# Which colour?"
    assert "### System\n\nBe brief.\n" in markdown and "### You\n\nWhich colour?\n" in markdown
    assert "### Assistant (tiny)\n\nBlue.\n" in markdown and "green" not in markdown, "the branch that is shown"
    openai = download(tab, "[data-format=openai]", tmp_path).split("\n")
    assert openai[0] == "Which-colour.jsonl" and json.loads(openai[1]) == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Which colour?"},
            {"role": "assistant", "content": "Blue."},
        ]
    }


def test_a_file_of_the_first_version_is_still_read(visit: Open) -> None:
    file = file_of_version_1(entropy="Mw==")
    tab = visit({"lens": True})
    bring(tab, file)
    tab.page.click(".row .open")
    tab.page.click(".token")
    assert "100.00 %" in tab.texts(".lens-card li")[0] and "0.20 here" in tab.texts(".lens-card p")[0]
    bring(tab, file)
    assert tab.count(".row") == 2
    saved = tab.saved()
    assert len({id for conversation in saved for id in conversation["nodes"]}) == 4, "a copy has names of its own"
