"""What every cache on the disk rests on: entries are whole or absent, checked, and bounded in size."""

import json
import multiprocessing
import os
import resource
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import accel.store.entry
import accel.store.machine
from accel.store.disk import DamagedError, DiskStore
from accel.store.entry import EntryWriter, Key

SUFFIX = ".test-entry"
KEY = Key.of({"made from": "something"}, "a label")
TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "floats": torch.arange(3, dtype=torch.float32),
    "even": torch.arange(1024, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0),
    "last": torch.arange(2**16, dtype=torch.int32).reshape(256, 256),
}
CONTENT = {"a list": [1, 2.5, None], "words": "übermütig"}


@pytest.fixture
def store(tmp_path):
    return DiskStore(str(tmp_path / "store"), SUFFIX, 10**8)


def names(store):
    return sorted(path.name for path in Path(store.folder).iterdir())


def numbered(number):
    return Key.of({"number": number}, str(number))


def test_what_was_stored_is_found_in_the_next_process(store):
    assert store.open(KEY) is None
    store.put(KEY, TENSORS, CONTENT)
    progress = []
    entry = store.open(KEY, lambda done, total: progress.append((done, total)))
    assert entry.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(entry.tensors[name], tensor)
        assert entry.tensors[name].data_ptr() % 64 == 0
    assert (entry.content, entry.bytes, progress) == (CONTENT, store.path(KEY).stat().st_size, [(1, 1)])
    assert names(store) == [entry.name]
    assert entry.name.startswith("a label-")
    assert entry.name.endswith(SUFFIX)
    with safe_open(store.path(KEY), framework="pt") as handle:  # a file that others can read
        assert torch.equal(handle.get_tensor("last"), TENSORS["last"])


def test_an_entry_may_have_no_tensors_and_be_written_anew(store):
    for content in ({"first": 1}, ["x" * 100_000]):
        store.put(KEY, {}, content)
        assert store.open(KEY).content == content
    assert len(names(store)) == 1
    store.remove(KEY)
    assert store.open(KEY) is None
    store.remove(KEY)


def test_every_run_is_checked(store, monkeypatch):
    monkeypatch.setattr(accel.store.entry, "RUN_BYTES", 1000)
    store.put(KEY, TENSORS)
    progress = []
    store.open(KEY, lambda done, total: progress.append((done, total)))
    assert progress == [(done, 265) for done in range(1, 266)]


def flip(at):
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if at >= 0 else flip(len(data) + at)(data)


def of_something_else(data):
    """Whole in itself."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]["header_crc32"]
    header["__metadata__"]["key"] = "{}"
    checksum = f"{zlib.crc32(json.dumps(header, sort_keys=True).encode()):08x}"
    header["__metadata__"]["header_crc32"] = checksum
    return data[:8] + json.dumps(header).encode().ljust(length) + data[8 + length :]


DAMAGES = {
    "empty": (lambda data: b"", "cut off"),
    "cut off": (lambda data: data[:-1000], "cut off"),
    "longer": (lambda data: data + b"\0", "cut off"),
    "length of the header": (flip(0), ""),
    "a bit of the header": (flip(300), ""),
    "a bit of the first tensor": (flip(-200_000), "content was changed"),
    "a bit of the last tensor": (flip(-1), "content was changed"),
    "zeros at the end": (lambda data: data[:-100_000] + b"\0" * 100_000, "content was changed"),
    "no JSON": (lambda data: b"\x10\0\0\0\0\0\0\0not a header....", ""),
    "JSON of something else": (lambda data: b"\x10\0\0\0\0\0\0\0" + b'{"a":[1,2,3,45]}', ""),
    "metadata of something else": (lambda data: b"\x12\0\0\0\0\0\0\0" + b'{"__metadata__":1}', ""),
    "an endless list": (lambda data: (10**5).to_bytes(8, "little") + b"[" * 10**5, ""),
    "another entry": (of_something_else, "made from something else"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_deleted_and_its_reader_told(store, damage, reason):
    store.put(KEY, TENSORS, CONTENT)
    path = store.path(KEY)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedError, match=r"^'a label-.*' is damaged \(.*" + reason) as found:
        store.open(KEY)
    assert f"({found.value.reason})" in str(found.value)
    assert names(store) == []
    assert store.open(KEY) is None


def test_an_entry_that_another_process_replaces_meanwhile_is_not_called_damaged(store, monkeypatch):
    store.put(KEY, TENSORS)
    check, replaced = accel.store.entry._check_data, []

    def replacing(*arguments):
        if not replaced:
            replaced.append(store.put(KEY, {"last": torch.ones(256, 256)}))
        check(*arguments)

    monkeypatch.setattr(accel.store.entry, "_check_data", replacing)
    assert store.open(KEY).tensors.keys() == {"last"}
    assert names(store) == [store.path(KEY).name]


def test_what_is_mapped_stays_whole_when_its_file_is_replaced_or_deleted(store):
    store.put(KEY, TENSORS)
    mapped = store.open(KEY).tensors["last"]
    store.put(KEY, {"last": torch.zeros(256, 256, dtype=torch.int32)})
    assert torch.equal(mapped, TENSORS["last"])
    store.remove(KEY)
    assert torch.equal(mapped, TENSORS["last"])


def test_many_tensors_take_linear_time(store):
    """Every tensor is looked at once: counted in calls, not in seconds."""
    counts = []
    for tensors in (200, 400):
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event == "call"

        writer = store.writer(numbered(tensors), 64 * tensors, tensors)
        sys.setprofile(count)
        try:
            for index in range(tensors):
                writer.add(f"layer{index}.weight", torch.full((64,), index % 256, dtype=torch.uint8))
            writer.finish()
            entry = store.open(numbered(tensors))
        finally:
            sys.setprofile(None)
        assert [int(entry.tensors[f"layer{index}.weight"][0]) for index in (0, 7, 199)] == [0, 7, 199]
        counts.append(calls)
    assert counts[1] < 2.1 * counts[0]


# What goes wrong while an entry is written.

FORK = multiprocessing.get_context("fork")


def write(store, connection, limit_bytes):
    if limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        writer = store.writer(KEY, 10**6, len(TENSORS), 1000)
        writer.add("even", TENSORS["even"])
        connection.send("half way")
        connection.recv()
        writer.add("last", TENSORS["last"])
        writer.finish(CONTENT)
        connection.send("finished")
    except OSError as exc:
        connection.send(exc.strerror)


def start(store, limit_bytes=None):
    """A process that has written half of an entry."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=write, args=(store, theirs, limit_bytes), daemon=True)
    process.start()
    assert ours.recv() == "half way"
    return process, ours


def go_on(process, connection):
    connection.send("go on")
    said = connection.recv()
    process.join()
    return said


def test_two_processes_make_the_same_entry_at_once(store):
    processes = [start(store) for _ in range(2)]
    assert len(names(store)) == 2  # each under a temporary name of its own
    assert store.open(KEY) is None
    for process in processes:
        assert go_on(*process) == "finished"
        assert store.open(KEY).content == CONTENT
    assert names(store) == [store.path(KEY).name]


def test_a_killed_writer_leaves_nothing_that_counts(store):
    process, _ = start(store)
    process.kill()
    process.join()
    (left,) = Path(store.folder).iterdir()
    assert left.name.endswith(".tmp")
    assert store.open(KEY) is None
    store.put(KEY, TENSORS)
    assert left.exists()  # perhaps it is still being written
    os.utime(left, (1, 1))
    store.put(numbered(1), TENSORS)
    assert names(store) == sorted(store.path(key).name for key in (KEY, numbered(1)))


def test_a_disk_that_fills_up_leaves_nothing(store):
    """The limit on file sizes makes the system refuse a write half way, as a full disk does."""
    assert go_on(*start(store, limit_bytes=100_000)) == "File too large"
    assert names(store) == []


def test_an_error_or_an_interrupt_leaves_nothing(store, monkeypatch):
    for error in (KeyboardInterrupt, OSError):
        writer = store.writer(KEY, 10**6, 10)
        writer.add("even", TENSORS["even"])
        with monkeypatch.context() as patch:
            patch.setattr(EntryWriter, "_write", lambda *arguments, error=error: (_ for _ in ()).throw(error()))
            with pytest.raises(error):
                writer.add("last", TENSORS["last"])
        assert names(store) == []
        writer.discard()
    writer = store.writer(KEY, 10**6, 10)
    writer.add("even", TENSORS["even"])
    writer.discard()
    assert names(store) == []
    with pytest.raises(OSError, match=r"header of .* bytes is larger than planned"):
        store.writer(KEY, 0, 0).finish("x" * 100_000)
    assert names(store) == []


@pytest.mark.parametrize("kind", ["a file in its place", "read-only"])
def test_a_folder_that_cannot_be_written(tmp_path, kind):
    if kind == "read-only":
        folder = Path("/proc/flux-hotswap")  # not even root can write there
    else:
        folder = tmp_path / "file"
        folder.write_text("")
    store = DiskStore(str(folder), SUFFIX, 10**8)
    assert store.open(KEY) is None
    with pytest.raises(OSError, match=str(folder)):
        store.put(KEY, TENSORS)
    store.remove(KEY)


# The limit.


def test_what_was_not_used_for_longest_makes_room(store):
    tensors = {"data": torch.zeros(2**20, dtype=torch.uint8)}
    for number in range(4):
        store.put(numbered(number), tensors)
        os.utime(store.path(numbered(number)), (1000 + number, 1000 + number))
    foreign = Path(store.folder) / "flux1-dev.safetensors"
    foreign.write_bytes(b"a user's own" * 10**6)
    store.open(numbered(0))  # used again: now the newest
    size = store.path(numbered(0)).stat().st_size
    tight = DiskStore(store.folder, SUFFIX, 4 * size)
    tight.put(numbered(3), tensors)  # takes the place of the one that is there, and no other's
    assert len(names(store)) == 5
    tight.put(numbered(4), tensors)
    left = [number for number in range(5) if store.path(numbered(number)).exists()]
    assert left == [0, 2, 3, 4]
    assert foreign.exists()


def test_an_entry_larger_than_the_limit_is_refused_and_nothing_deleted_for_it(store):
    store.put(KEY, TENSORS)
    tight = DiskStore(store.folder, SUFFIX, 60_000_000)
    with pytest.raises(OSError, match=r"0\.1 GB are needed, and the limit of the cache is 0\.1 GB"):
        tight.put(numbered(1), {"data": torch.zeros(64_000_000, dtype=torch.uint8)})
    assert names(store) == [store.path(KEY).name]


def test_a_disk_without_room_is_found_before_anything_is_written(store, monkeypatch):
    store.put(KEY, TENSORS)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("accel.store.disk.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"0\.0 GB are needed, and 0\.0 GB are free"):
        store.put(numbered(1), TENSORS)
    assert not store.path(numbered(1)).exists()


# The machine.


def test_other_machines_sources_and_settings_are_others(monkeypatch):
    base = accel.store.machine.machine("cpu")
    assert accel.store.machine.machine("cpu") == base
    sources = {path.name for path in accel.store.machine.PACKAGE.rglob("*.py")}
    assert sources >= {"engine.py", "operators.py", "machine.py"}
    changes = {
        "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
        "sources": lambda patch: patch.setattr(accel.store.machine, "_sources_digest", lambda: "another"),
        "cpu": lambda patch: patch.setattr(accel.store.machine, "_cpu", lambda: ["another"]),
        "variables": lambda patch: patch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1"),
    }
    for fact, change in changes.items():
        with monkeypatch.context() as patch:
            change(patch)
            other = accel.store.machine.machine("cpu")
            assert {name for name in base if base[name] != other[name]} == {fact}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert accel.store.machine.machine("cpu") == base
