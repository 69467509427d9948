"""Headers of safetensors files, and what a user is told about files that are none."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from accel.errors import FileError
from accel.files import FileIdentity, open_tensors, read_header
from harness import broken_files

EXPECTED = {
    "empty": ["is empty (0 bytes)", "Get it again"],
    "truncated": ["is truncated", "bytes", "get it again"],
    "truncated_header": ["is damaged", "truncated"],
    "html_page": ["web page", "Download it again"],
    "giant_header": ["announce a header of 4,611,686,018,427,387,904 bytes", "get it again"],
    "garbage_header": ["is damaged", "not the JSON"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_unreadable_files_are_explained(tmp_path, name):
    path = getattr(broken_files, name)(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileError) as caught:
        read_header(path)
    message = str(caught.value)
    assert f"'{name}.safetensors'" in message
    for words in EXPECTED[name]:
        assert words in message


def test_offsets_outside_the_file_are_refused(tmp_path):
    path = broken_files.offsets_outside(tmp_path / "outside.safetensors")
    with pytest.raises(FileError, match=r"'outside\.safetensors'"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "holds no tensors"),
        (b"abc\0", "damaged"),
        (b'{"error": "Unauthorized"}', "holds text .*Unauthorized.*as when a download fails"),
        (b'{\n  "error": 1}', "holds text"),
        (b"Not found", "holds text .*Not found"),
        (b"PK\x03\x04" + bytes(26) + b"lora.safetensors" + bytes(100), "ZIP archive. Unpack"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(100), "pickle"),
    ],
)
def test_other_formats_are_named(tmp_path, content, words):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=f"'other.safetensors'.*{words}"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [null, null]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"data_offsets": [0, 1.5]}}',
        '{"a": ' + "[" * 100_000,
    ],
)
def test_headers_that_are_no_headers(tmp_path, header):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(64))
    with pytest.raises(FileError, match=r"'hostile\.safetensors' is damaged: its header is not the JSON"):
        read_header(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileError, match=r"gone\.safetensors.*cannot be opened.*Choose another"):
        read_header(tmp_path / "gone.safetensors")


def test_header_without_data(tmp_path):
    path = tmp_path / "good.safetensors"
    tensors = {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros((), dtype=torch.float8_e4m3fn)}
    save_file(tensors, path, {"who": "me"})
    file = read_header(path)
    assert {key: (info.shape, info.dtype, info.bytes) for key, info in file.tensors.items()} == {
        "a": ((2, 3), torch.bfloat16, 12),
        "b": ((), torch.float8_e4m3fn, 1),
    }
    assert file.metadata == {"who": "me"}
    assert file.identity == FileIdentity.of(path)


EXTRA = {"a byte": b"x", "zeros": bytes(4096), "another file": b"<html>" * 1000}


@pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)
def test_bytes_behind_the_last_tensor_change_nothing(tmp_path, extra):
    """The safetensors library calls such a file incomplete; ComfyUI's own parser reads it."""
    path = tmp_path / "longer.safetensors"
    tensors = {
        "matrix": torch.randn(3, 5), "scalar": torch.tensor(2.0, dtype=torch.bfloat16), "empty": torch.zeros(0, 4),
        "fp8": torch.randn(7).to(torch.float8_e4m3fn), "bytes": torch.arange(3, dtype=torch.uint8),
    }  # fmt: skip
    save_file(tensors, path, {"who": "me"})
    whole = read_header(path)
    path.write_bytes(path.read_bytes() + extra)
    with pytest.raises(SafetensorError, match=r"not fully covered|MetadataIncompleteBuffer"):
        load_file(path)
    file = read_header(path)
    assert (file.tensors, file.starts, file.metadata) == (whole.tensors, whole.starts, {"who": "me"})
    with open_tensors(file) as handle:
        for key, tensor in tensors.items():
            read = handle.get_tensor(key)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


F32 = {"dtype": "F32", "shape": [1]}
DAMAGED = {
    "a gap": ({"a": {**F32, "data_offsets": [0, 4]}, "b": {**F32, "data_offsets": [8, 12]}}, "overlap, or leave gaps"),
    "an overlap": ({"a": {**F32, "data_offsets": [0, 4]}, "b": {**F32, "data_offsets": [2, 6]}}, "overlap, or leave"),
    "no begin": ({"a": {**F32, "data_offsets": [4, 8]}}, "overlap, or leave gaps"),
    "another size": ({"a": {**F32, "data_offsets": [0, 8]}}, "says of 'a' "),
    "a negative place": ({"a": {**F32, "data_offsets": [-4, 0]}}, "says of 'a' "),
    "a negative shape": ({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, "says of 'a' "),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, "says of 'a' "),
    "metadata of numbers": ({"a": {**F32, "data_offsets": [0, 4]}, "__metadata__": {"who": 1}}, "of '__metadata__' "),
}


@pytest.mark.parametrize(("header", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_before_further_bytes_is_refused(tmp_path, header, words):
    content = json.dumps(header).encode()
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(64))
    with pytest.raises(FileError, match=rf"'damaged\.safetensors' is damaged.*{words}"):
        read_header(path)


def test_a_file_that_changed_after_its_header_was_read_is_refused(tmp_path):
    path = tmp_path / "changing.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    file = read_header(path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(FileError, match=r"'changing\.safetensors' was changed"), open_tensors(file):
        pass


def test_links_and_relative_paths_identify_the_same_file(tmp_path, monkeypatch):
    path = tmp_path / "real.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    monkeypatch.chdir(tmp_path)
    assert FileIdentity.of(link) == FileIdentity.of(path) == FileIdentity.of("real.safetensors")
