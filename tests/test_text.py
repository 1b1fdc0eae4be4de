"""data/text/prepare.py: text of one's own, from a file, a folder or JSON lines."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

import data

PATH = Path(__file__).parent.parent / "data" / "text" / "prepare.py"
spec = spec_from_file_location("prepare_text", PATH)
prepare = module_from_spec(spec)
spec.loader.exec_module(prepare)


def prepared(source, out_dir, *options):
    prepare.main(["--source", str(source), "--out_dir", str(out_dir), *options])
    return {name: np.fromfile(out_dir / f"{name}.bin", dtype=np.uint8).tobytes() for name in data.SPLITS}


def test_a_file_is_cut_at_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 1000)  # several pieces
    lines = [f"line {i} of a nové☃l\n" + "\n" * (i % 3 == 0) for i in range(2000)]
    (tmp_path / "novel.txt").write_bytes("".join(lines).replace("\n", "\r\n").encode())
    splits = prepared(tmp_path / "novel.txt", tmp_path / "out")
    assert b"".join(splits[name] for name in data.SPLITS) == "".join(lines).encode()
    assert all(text.endswith(b"\n") for text in splits.values())
    shares = [len(splits[name]) / len("".join(lines).encode()) for name in data.SPLITS]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.005)
    assert data.Dataset(str(tmp_path / "out")).meta["codec"] == "bytes"


def test_files_of_a_folder_and_documents_are_dealt_out_whole(tmp_path):
    texts = {f"{i % 7}/file{i}.py": f"text of file {i}\nand more of it\n" for i in range(200)}
    for name, text in texts.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "folder" / "picture.png").write_bytes(b"\x89PNG\0\xff\xfe")
    (tmp_path / "folder" / ".hidden").write_text("not this\n")
    records = [json.dumps({"body": text, "n": 1}) for text in [*texts.values(), *texts.values()]]
    (tmp_path / "documents.jsonl").write_text("\n".join(records) + "\n\n")
    for source, options, copies in (("folder", (), 1), ("documents.jsonl", ("--field=body",), 2)):
        splits = prepared(tmp_path / source, tmp_path / "out", *options)
        found = [document for text in splits.values() for document in text.decode().split("\n\n") if document]
        assert sorted(found) == sorted(text.rstrip("\n") for text in texts.values() for _ in range(copies))
        kept = {name: set(text.decode().split("\n\n")) - {""} for name, text in splits.items()}
        assert not (kept["train"] & kept["val"] or kept["train"] & kept["test"] or kept["val"] & kept["test"])
        assert 0.8 < len(kept["train"]) / 200 < 0.97
    assert "1 others left out" in prepare_meta(tmp_path / "folder", tmp_path / "again")


def prepare_meta(source, out_dir):
    prepared(source, out_dir)
    return json.loads((out_dir / "meta.json").read_text())["label"]


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("empty.txt", b"", "leaves 0 tokens for the train split"),
        ("binary.bin", b"abc\0def\n" * 50, "holds a byte 0"),
        ("wide.txt", "text of a novel\n".encode("utf-16"), "is UTF-16: convert it"),
        ("latin.txt", "caf\xe9\n".encode("latin-1") * 50, "is not UTF-8 text"),
        ("long.txt", b"x" * 3_000_000, "has a line of more than 1048576 bytes"),
        ("one.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: no text in 'text': write --field=NAME"),
        ("list.jsonl", b"[1, 2]\n", "line 1: no text in 'text'"),
        ("broken.jsonl", b'{"text": "a"\n', "line 1: not JSON"),
    ],
)
def test_wrong_sources_are_one_line(name, content, complaint, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    arguments = ["--source", str(tmp_path / name), "--out_dir", str(tmp_path / "out")]
    assert data.run_prepare(lambda: prepare.main(arguments)) == 1
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1 and name in error
    assert not list(tmp_path.glob("out/*"))


def test_names(tmp_path, capsys):
    assert data.run_prepare(lambda: prepare.main([])) == 1
    assert "write --source FILE, FOLDER or documents.jsonl" in capsys.readouterr().err
    assert data.run_prepare(lambda: prepare.main(["--source", str(tmp_path / "none.txt")])) == 1
    assert "none.txt does not exist" in capsys.readouterr().err
    (tmp_path / "enwik8.txt").write_text("a\n" * 100)
    assert data.run_prepare(lambda: prepare.main(["--source", str(tmp_path / "enwik8.txt")])) == 1
    assert "enwik8 belongs to another data set: write --out_dir=FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["novel.txt", "some/where/novel.jsonl"])
def test_a_text_in_place_of_a_data_set_names_the_command(name):
    with pytest.raises(
        data.DataError, match=f"^{name} is a text: python data/text/prepare.py --source {name} .*=novel$"
    ):
        data.Dataset(name)
