"""One statement of the kernels' interface: the bindings are what quadriga.h says, and a library that is not is refused."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quadriga import runtime
from quadriga.errors import ConfigError, HardwareError
from quadriga.kernels.cpu import bindings
from quadriga.kernels.cpu import library as cpu
from quadriga.quant.packed import BLOCK_TOKENS, FROM_GGUF, KV_FORMATS, PACKED, kv_block_bytes, latent_block_bytes

TOOL = Path(__file__).parents[2] / "tools/bindings.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bindings_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_what_is_generated_is_up_to_date(tool: ModuleType) -> None:
    for path, text in tool.generated().items():
        assert path.read_text() == text, f"{path.name}: run `make bindings`"
    assert tool.main(["--check"]) == 0
    assert tool.main(["--sheck"]) == 2


def test_the_bindings_of_a_small_header(tool: ModuleType) -> None:
    interface = tool.read(HEADER)
    assert interface.constants == {"MOST": 7}
    names: dict[str, object] = {}
    exec(compile(tool.bindings(interface), "bindings", "exec"), names)
    assert names["MOST"] == 7
    kind = names["TwoWords"]
    assert [(member.name, int(member)) for member in kind] == [("FIRST", 0), ("SECOND_ONE", 1)]  # type: ignore[attr-defined]
    outer = names["Outer"]
    assert issubclass(outer, ctypes.Structure)  # type: ignore[arg-type]
    assert [field[0] for field in outer._fields_] == ["inner", "many", "data", "rows", "cols", "rate"]  # type: ignore[attr-defined]
    assert outer.rows.offset == 24 and ctypes.sizeof(outer) == 48  # type: ignore[attr-defined]
    parameters = names["PARAMETERS"]["qd_do"]  # type: ignore[index]
    assert parameters == [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(outer),  # type: ignore[arg-type]
        ctypes.c_void_p,
        ctypes.c_float,
        ctypes.POINTER(names["Message"]),  # type: ignore[arg-type]
    ]
    assert names["CONSTANT_DATA"] == {"qd_text": ctypes.c_char_p}
    assert '{"qd_outer.many", offsetof(qd_outer, many), sizeof(qd_outer::many)},' in tool.fields(interface)


HEADER = """
#define QD_MOST 7 /* of
                     something */
enum qd_two_words { QD_TWO_WORDS_FIRST = 0, QD_TWO_WORDS_SECOND_ONE = 1 };
typedef struct qd_handle qd_handle;
typedef struct { char text[40]; } qd_message;
typedef struct { int32_t number; } qd_inner;
typedef struct {
  qd_inner inner;
  const qd_inner* many;
  const uint8_t* data;
  int64_t rows, cols;
  float rate;
} qd_outer;
const char* qd_text(void);
int32_t qd_do(qd_handle* handle, qd_handle** made, const qd_outer* outer,
              const float* x, float scale, qd_message* why);
"""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("enum qd_e { QD_E_A = 0, QD_E_B = 2 };", "number 1 must be QD_E_"),
        ("enum qd_e { QD_A = 0 };", "must be QD_E_... = 0"),
        ("enum { QD_A = 0 };", "no statement"),
        ("typedef struct { int32_t a, *b; } qd_s;", "no declaration"),
        ("typedef struct { int32_t* a, b; } qd_s;", "one at a time"),
        ("typedef struct { short a; } qd_s;", "no such type"),
        ("typedef struct { int32_t a : 3; } qd_s;", "no declaration"),
        ("typedef struct { int32_t a[4]; } qd_s;", "no such type"),
        ("typedef struct { int32_t a } qd_s;", "end with"),
        ("typedef struct { struct { int32_t a; } b; } qd_s;", "no statement"),
        ("typedef struct { qd_later a; } qd_s;", "no such type"),
        ("typedef struct { qd_handle a; } qd_s;", "no such type"),
        ("typedef struct { float** a; } qd_s;", "no such type"),
        ("typedef struct { int32_t a; } qd_outer;", "stated twice"),
        ("typedef struct qd_a qd_b;", "one name"),
        ("typedef union { int32_t a; } qd_u;", "no statement"),
        ("int32_t qd_f(int32_t a);", "last parameter"),
        ("int32_t qd_f(int32_t, qd_message* why);", "no declaration"),
        ("void qd_f(qd_message* why);", "no statement"),
        ("int64_t qd_f(qd_message* why);", "no statement"),
        ("int32_t qd_f(void (*back)(int), qd_message* why);", "no statement"),
        ("int32_t qd_f(qd_message* why)", "no statement"),
        ("#define QD_TWICE(x) 2", "no preprocessor line"),
        ("#include <stddef.h>", "no preprocessor line"),
        ("int32_t x; // a comment", "no statement"),
    ],
)
def test_what_the_generator_does_not_read_is_an_error_that_names_the_line(
    tool: ModuleType, line: str, says: str
) -> None:
    number = HEADER.count("\n") + 1
    with pytest.raises(tool.HeaderError, match=rf"line {number}: .*{says}"):
        tool.read(f"{HEADER}{line}\n")


# The library against the bindings ------------------------------------------------------------------------------------


def test_the_library_has_every_field_where_python_has_it() -> None:
    table = cpu._fields_of(cpu.library())
    assert table == cpu._fields_here()
    assert {name.split(".")[0] for name in table} == set(bindings.STRUCTS)
    assert table["qd_matrix"] == (0, 32) and table["qd_matrix.format"] == (24, 4)


def test_a_library_of_another_header_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "HEADER_SHA256", "0" * 64)
    with pytest.raises(HardwareError, match=r"another quadriga.h.*make build"):
        cpu.library.__wrapped__()


def test_a_library_without_a_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bindings.PARAMETERS, "qd_new", [])
    with pytest.raises(HardwareError, match=r"no function qd_new.*make build"):
        cpu.library.__wrapped__()


@pytest.mark.parametrize("change", ["order", "type", "less", "more"])
def test_a_library_whose_compiler_put_fields_elsewhere_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fields of one size in another order, which no sum of sizes sees, and every other difference."""
    fields = {
        "order": [("data", ctypes.c_void_p), ("cols", ctypes.c_int64), ("rows", ctypes.c_int64)],
        "type": [("data", ctypes.c_void_p), ("rows", ctypes.c_int32), ("cols", ctypes.c_int64)],
        "less": [("data", ctypes.c_void_p), ("rows", ctypes.c_int64)],
        "more": [("data", ctypes.c_void_p), ("rows", ctypes.c_int64), ("cols", ctypes.c_int64), ("x", ctypes.c_int32)],
    }[change]
    wrong = type("Wrong", (ctypes.Structure,), {"_fields_": [*fields, ("format", ctypes.c_int32)]})
    monkeypatch.setitem(bindings.STRUCTS, "qd_matrix", wrong)
    with pytest.raises(HardwareError, match=r"qd_matrix[.a-z]* lies at .*make build"):
        cpu.library.__wrapped__()


def test_every_status_is_an_error_with_a_message() -> None:
    assert set(cpu._ERRORS) == set(bindings.Status) - {bindings.Status.OK}


def test_every_function_of_a_context_refuses_one_that_is_closed(tool: ModuleType) -> None:
    """Not one of them touches memory that is not there: the status comes before everything else."""
    interface = tool.read((tool.CPU / "csrc/quadriga.h").read_text())
    tested = 0
    for name, parameters in interface.functions.items():
        if name == "qd_destroy" or parameters[0].type not in ("qd_context", "qd_store") or parameters[0].stars != 1:
            continue
        if name == "qd_store_destroy":
            continue
        nothing = [0 if one.stars == 0 else None for one in parameters[:-1]]
        with pytest.raises(ConfigError, match="it was closed"):
            cpu.call(getattr(cpu.library(), name), *nothing)
        tested += 1
    assert tested > 15


def test_closing_nothing_is_fine() -> None:
    cpu.call(cpu.library().qd_destroy, None)
    cpu.call(cpu.library().qd_store_destroy, None)


# Stated twice, and held together here --------------------------------------------------------------------------------


def test_numbers_that_python_states_itself_are_the_headers() -> None:
    assert BLOCK_TOKENS == bindings.BLOCK_TOKENS
    assert runtime.MOST_THREADS == bindings.MOST_THREADS
    assert tuple(cpu.FORMATS) == tuple(PACKED)
    assert tuple(cpu.KV_FORMATS) == KV_FORMATS
    assert set(FROM_GGUF) < {*cpu.SOURCES, *cpu.codes(bindings.Stored)}


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("shape", [(1, 1), (15, 31), (16, 64), (33, 65), (100, 320)])
def test_packed_sizes_are_the_librarys(form: str, shape: tuple[int, int]) -> None:
    size = ctypes.c_int64()
    cpu.call(cpu.library().qd_packed_bytes, cpu.FORMATS[form], *shape, ctypes.byref(size))
    assert size.value == PACKED[form].nbytes_of(*shape)


@pytest.mark.parametrize("form", KV_FORMATS)
@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 128])
def test_cache_sizes_are_the_librarys(form: str, head_dim: int) -> None:
    size = ctypes.c_int64()
    cpu.call(cpu.library().qd_kv_bytes, cpu.KV_FORMATS[form], head_dim, ctypes.byref(size))
    assert 3 * size.value == kv_block_bytes(form, 3, head_dim)


@pytest.mark.parametrize("form", KV_FORMATS)
def test_sizes_of_latents_are_the_librarys(form: str) -> None:
    size = ctypes.c_int64()
    for rank, rope_dim in ((32, 10), (512, 64)):
        cpu.call(cpu.library().qd_latent_bytes, cpu.KV_FORMATS[form], rank, rope_dim, ctypes.byref(size))
        assert size.value == latent_block_bytes(form, rank, rope_dim)
    with pytest.raises(ConfigError, match="rank must be a multiple of 32, got 48"):
        cpu.call(cpu.library().qd_latent_bytes, cpu.KV_FORMATS[form], 48, 10, ctypes.byref(size))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [("qd_packed_bytes", (15, 1, 1)), ("qd_packed_bytes", (-1, 1, 1)), ("qd_kv_bytes", (3, 8))],
)
def test_a_number_that_names_no_format_is_refused(function: str, arguments: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="must be one of qd_"):
        cpu.call(getattr(cpu.library(), function), *arguments, ctypes.byref(ctypes.c_int64()))
