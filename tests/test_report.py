"""Pages and pictures are in step with the records: nobody types a figure."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import ops, prefill, report
from benchmarks.pages import fill_in, marked

ROOT = Path(__file__).parent.parent
AGAIN = "python -m benchmarks.report fills it in"
FIGURE = re.compile(r"[\d.,]+ ?(?:tok/s|tokens a second|[TG]B/s|TFLOP/s|us|µs|ms)\b")


@pytest.fixture
def copy(tmp_path):
    """The records and pages of this checkout, to be changed."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def change(root, name, edit):
    path = root / "benchmarks" / "results" / f"{name}.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("page", report.PAGES)
def test_committed_pages_are_in_step(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    parts = report.parts(report.read(ROOT / "benchmarks" / "results"), page)
    assert fill_in(text, "benchmarks", parts) == text, f"{page} and benchmarks/results differ: {AGAIN}"
    found = marked(text, "benchmarks")
    assert found and all(found.values())
    assert text.count("<!-- benchmarks: ") == len(found)


def test_every_part_has_a_place():
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in report.PAGES]
    assert {name for page in pages for name in marked(page, "benchmarks")} == report.PARTS.keys()


def test_committed_pictures_are_in_step():
    drawn = list(report.pictures(report.read(ROOT / "benchmarks" / "results")))
    for name, _, data in drawn:
        text = (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")
        assert report.digest(data) in text, f"{name}.svg was drawn from other figures: {AGAIN}"


@pytest.mark.parametrize("page", report.PAGES)
def test_no_figure_is_typed_by_hand(page):
    """Outside the marked parts and what is pasted from a run."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"<!-- benchmarks: .*?<!-- end -->|^```.*?^```", "", text, flags=re.S | re.M)
    assert not FIGURE.findall(text)


def test_typed_figures_are_found():
    assert FIGURE.findall("at 1,742 tok/s, 3.17 TB/s and 4 us of 20 users") == ["1,742 tok/s", "3.17 TB/s", "4 us"]


def test_a_changed_record_changes_pages_and_pictures(copy, monkeypatch):
    saved = []
    monkeypatch.setattr(report, "use_style", lambda name: None)
    monkeypatch.setattr(report, "save", lambda figure, path, digest: saved.append(path.name))
    for picture in report.PICTURES:
        monkeypatch.setitem(report.PICTURES, picture, report.PICTURES[picture]._replace(draw=lambda data: None))
    report.write(copy)
    assert not saved and (copy / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()

    def faster(record):
        for row in record["rows"]:
            if row["context"] == report.BESIDE and row["choice"] == "greedy" and row["one_launch"]:
                row["median"] = 98765.4

    change(copy, "decode", faster)
    report.write(copy)
    assert saved == ["decode.svg"]
    assert all("98,765" in (copy / page).read_text() for page in report.PAGES)


def test_pictures_are_drawn(copy):
    pytest.importorskip("matplotlib")
    for path in (copy / "docs" / "images").glob("*.svg"):
        path.unlink()
    records = report.read(copy / "benchmarks" / "results")
    report.draw(records, copy / "docs" / "images")
    for name, _, data in report.pictures(records):
        text = (copy / "docs" / "images" / f"{name}.svg").read_text()
        assert text.count("<path") > 5 and report.digest(data) in text and ">cuqwen</text>" in text


def test_a_missing_record_leaves_its_parts_out(copy):
    records = report.read(copy / "benchmarks" / "results")
    for missing in ("decode", "prefill", "generate", "accuracy", "ops", "peers"):
        rest = {name: record for name, record in records.items() if name != missing}
        for name, part in report.parts(rest, "README.md").items():
            said = f"benchmarks.{missing}`" in part or part == f"(No picture without {missing}.json.)"
            assert said or report.PARTS[name].needs[0] != missing


def started(cache, end):
    """A row as benchmarks/generate.py writes it."""
    spans = {"first token": [end, end], "weights": [0.5, 0.75]}
    times = {"process_seconds": end + 0.1, "load_seconds": 0.4, "first_token_seconds": 0.1}
    return {"kernel_cache": cache, "tokens": 1, "spans": spans, **times}


def test_new_records_fill_their_parts(copy):
    """Rows as benchmarks/prefill.py and benchmarks/ops.py write them."""
    records = report.read(copy / "benchmarks" / "results")
    head = {key: records["decode"][key] for key in ("gpu", "driver", "versions", "date", "commit", "command")}
    rows = [
        prefill.row(size, what, tokens, mode, [100.0 * number], host=1.0)
        for size in ("0.6B", "8B")
        for what, lengths in (("prefill", prefill.LENGTHS), ("first token", prefill.FIRST_TOKEN_LENGTHS))
        for tokens in lengths
        for number, mode in enumerate(report.MODES, 1)
    ]
    memory = {"plan": "weights 1.19 GB", "used_bytes": 2.5e9, "percent_of_plan": 99.4}
    measured = dict.fromkeys((key for _, key in ops.COLUMNS), 12.5) | {
        "operation": "matmul",
        "what": "o",
        "torch": None,
    }
    large = measured | {
        "what": "N 9",
        "size": "large",
        "tokens": 9,
        "ceiling": "tensor",
        "teraflops": 600.0,
        "torch": 10.0,
    }
    broken = {"operation": "matmul", "what": "o", "size": "8B", "tokens": 1, "error": "lost"}
    records |= {
        "prefill": {**head, "rows": rows, "memory": memory},
        "ops": {
            **head,
            "rows": [
                measured | {"size": "8B", "tokens": n, "ceiling": "read", "gigabytes_per_second": 2e3}
                for n in (1, 2048)
            ]
            + [large, broken],
            "ceilings": {"read": 2.98e12, "copy": 2.9e12, "node": 1.04, "tensor": 800e12},
        },
        "generate": records["generate"]
        | {"cuqwen": [started(cache, end) for cache in ("cold", "warm") for end in (1.5, 1.0, 9.0)]},
        "load": {
            **head,
            **{"size": "8B", "bytes": 16e9, "files": 4, "copy": 5e10, "reads": {"1": 8e9, "8": 4e10}},
            **{
                "load_seconds": [0.4, 0.5, 0.9],
                "rate": 3.2e10,
                "percent_of_slower": 80.1,
                "safetensors_torch_seconds": 4.0,
            },
        },
    }
    parts = report.parts(records, "docs/performance.md")
    # 440,401,920 weights in layers, 28 layers, 16 heads of 128: 800e12 / (2 * 440401920 + 2 * 28 * 16 * 128 * 2049)
    row = "| 0.6B | 2,048 | 716,975 | 20,480 | 3 % | 10,240 | 6,827 | 81,400 |"
    assert row in parts["prefill"].splitlines()
    del records["ops"]["ceilings"]["tensor"]
    assert row.replace("716,975", "–").replace("3 %", "–") in report.prefill(records)
    assert "| 8B | 20 | 100.00 ms | 200.00 ms | 300.00 ms |" in parts["first token"].splitlines()
    assert "99 % of the plan" in parts["memory"]
    assert parts["spans"].splitlines()[2:] == [
        "| weights | 0.50 s | 0.75 s | 0.25 s |",
        "| first token | 1.50 s | 1.50 s | 0.00 s |",
    ]
    assert "| **cuqwen** | 1.00 s | 0.40 s | 0.10 s | **1.5 s** |" in parts["start"].splitlines()
    assert (
        "| **`cuqwen.load`**, all of it | **32.0 GB/s**, 0.50 s, 80 % of the slower of the two |"
        in parts["load"].splitlines()
    )
    assert "| safetensors for PyTorch, tensors only | 4.0 GB/s, 4.00 s |" in parts["load"].splitlines()
    assert "| reading memory | 2.98 TB/s |" in parts["ceilings"].splitlines()
    assert parts["operations"].count("| `matmul` o | 8B | 12.5 | 12.5 | 12 % of read | – | 12.5 |") == 2
    assert parts["products"].splitlines()[::2] == ["|  | 8B |", "| `matmul` o | 12 % of 25 MB |"]
    assert parts["large"].splitlines()[2:] == ["| `matmul` N 9 | 9 | TFLOP/s | 600 | 12 % of tensor | 750 |"]
    assert parts["prefill picture"] == f"![{report.PICTURES['prefill'].caption}](images/prefill.svg)"
    assert "**20,480 tokens a second** of a prompt of 2,048 tokens" in parts["summary"]
    assert not [name for name, part in parts.items() if "Not measured" in part]


def test_peers_of_the_same_run_count_before_those_of_another(copy):
    records = report.read(copy / "benchmarks" / "results")
    records["decode"]["transformers"] = []
    before = report.peers(records, "decode", "0.6B")
    records["decode"]["transformers"] = [
        {"engine": "transformers eager", "context": 128, "tokens_per_second": [20.0, 22.0, 21.0]},
        {"engine": "transformers static", "error": "TimeoutError"},
    ]
    now = report.peers(records, "decode", "0.6B")
    assert now["transformers"] == {128: 21.0}
    assert {name: by for name, by in now.items() if name != "transformers"} == {
        name: by for name, by in before.items() if name != "transformers"
    }


def test_start_is_told_by_stage():
    def run(cache, tokens, whole, load, first):
        spans = {"first token": [whole, whole]}
        return {
            "kernel_cache": cache,
            "tokens": tokens,
            "load_seconds": load,
            "first_token_seconds": first,
            "spans": spans,
        }

    record = {
        "cuqwen": [
            run("cold", 1, 9.0, 2.0, 4.0), run("warm", 1, 2.0, 1.0, 0.5), run("warm", 1, 2.5, 1.25, 0.5),
            run("warm", 1, 8.0, 7.0, 0.75), run("warm", 256, 99.0, 50.0, 40.0),
        ],
        "transformers_bf16": {"import_seconds": 8.0, "load_seconds": 1.0, "first_token_seconds": 0.5},
    }  # fmt: skip
    found = {name: list(stages.values()) for name, stages in report.starts(record).items()}
    assert found["cuqwen"] == [0.75, 1.25, 0.5]  # medians; the rest of the process is imports
    assert found["cuqwen, first run on a machine"] == [3.0, 2.0, 4.0]
    assert found["transformers"] == [8.0, 1.0, 0.5]


def test_floors_and_shares():
    row = {
        "size": "8B",
        "choice": "greedy",
        "one_launch": True,
        "context": 128,
        "median": 160.0,
        "floor_microseconds": 5000,
    }
    record = {"decode": {"rows": [row, row | {"choice": "sampled", "median": 1.0}]}}
    assert "| 8B | 200 | 160 | 80 % | – | – |" in report.sizes(record).splitlines()
