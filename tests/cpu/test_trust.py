"""Tables, cubins, archives and recordings from anywhere: what is not intact is a miss with one warning, never more."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import re
import time
import warnings
import zipfile
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import H100, mma, row, wgmma

from marlin_gen import kernel_pack, subset, table_archive, whole_files, xz
from marlin_gen.arch import Gpu
from marlin_gen.cli.root import main
from marlin_gen.config import KernelSpec
from marlin_gen.dispatch import Dispatcher, digest
from marlin_gen.installed import tables_below
from marlin_gen.problem import Problem
from marlin_gen.record import load_recording
from marlin_gen.table import FILE_NAME, DispatchTable, TableWarning
from marlin_gen.table_file import check_seal, seal
from marlin_gen.table_publish import publish

ROWS = [row(4096, 4096, 1, mma(), default=mma(64)), row(4096, 4096, 16, wgmma(16, 256)), row(8192, 8192, 1, mma(48))]
ASKED = [Problem(4096, 4096, 1), Problem(4096, 4096, 100), Problem(4096, 14336, 3), Problem(64, 128, 1)]


@pytest.fixture
def written(tmp_path: Path) -> DispatchTable:
    return tables.table(tmp_path, ROWS)


def attempt(folder: Path) -> tuple[DispatchTable | None, list[str]]:
    """Load and use a table as serving does; the warnings it gave. Any exception fails the test."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = DispatchTable.load(folder)
        if found is not None:
            dispatcher = Dispatcher(H100, [found])
            for problem in ASKED:
                for choice in dispatcher.choose(problem):
                    if choice.kernel:  # whatever is offered to be loaded is the kernel of that name, whole
                        assert choice.kernel.image == choice.spec.key.encode()
            digest([found])
    assert all(issubclass(w.category, TableWarning) for w in caught)
    return found, [str(w.message) for w in caught]


def flips(content: bytes, step: int = 1):
    """The content with one bit of every ``step``-th byte turned over."""
    generator = random.Random(0)
    for at in range(0, len(content), step):
        yield at, content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :]


# The table's file.


def test_one_bit_anywhere_in_a_table_is_a_miss_with_one_warning(written):
    path = written.folder / FILE_NAME
    content = path.read_bytes()
    for at, damaged in flips(content):
        path.write_bytes(damaged)
        found, said = attempt(written.folder)
        assert found is None and len(said) == 1, f"byte {at} of {len(content)}: {content[at : at + 20]!r}"
    path.write_bytes(content)
    found, said = attempt(written.folder)
    assert found == written and not said


def test_a_table_cut_short_anywhere_is_a_miss_with_one_warning(written):
    path = written.folder / FILE_NAME
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        found, said = attempt(written.folder)
        assert found is None and len(said) == 1, length


def test_an_edit_that_leaves_good_json_is_noticed(written):
    path = written.folder / FILE_NAME
    path.write_text(path.read_text().replace('"us": 10.0', '"us": 1.0', 1))
    found, (said,) = attempt(written.folder)
    assert found is None and "its sha256 is not that of its content" in said


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_any_bytes_are_no_table(written, content):
    (written.folder / FILE_NAME).write_bytes(content)
    found, said = attempt(written.folder)
    assert found is None and len(said) == 1


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from places(inner, (*path, name))


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([0, -1, 2**31, 2**63, 10**400, -(10**400)]),
    st.floats(), st.text(max_size=8), st.sampled_from(["../x", "\0", "u4b8g128", "mma", "[" * 50]),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_any_place_of_a_sealed_table_is_harmless(written, data):
    """Who can write a table can seal it: its content is not believed either."""
    value = json.loads(written.text())
    del value["sha256"]
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([p for p in places(value) if p]))
        inner = value
        for name in path[:-1]:
            inner = inner[name]
        if data.draw(st.booleans()) and isinstance(inner, dict):
            inner[data.draw(st.text(max_size=5))] = inner.pop(path[-1])
        else:
            inner[path[-1]] = data.draw(ODD)
    (written.folder / FILE_NAME).write_text(seal(json.dumps(value)[1:]))
    check_seal((written.folder / FILE_NAME).read_bytes())
    attempt(written.folder)


def test_deep_nesting_is_a_miss(written):
    (written.folder / FILE_NAME).write_text(seal("[" * 200_000))
    found, said = attempt(written.folder)
    assert found is None and len(said) == 1


# Cubins.


def test_one_bit_anywhere_in_a_file_of_kernels_is_a_miss_with_one_warning(written):
    key = next(iter(written.kernels))
    path = tables.pack_of(written, key)
    content = path.read_bytes()
    for at, damaged in flips(content):
        path.write_bytes(damaged)
        found, said = attempt(written.folder)
        assert found.cubin(key) is None and len(said) == 1, at
    path.write_bytes(content)


def test_one_bit_anywhere_in_what_is_packed_is_a_miss_or_the_same_kernel(written):
    """A file that unpacks, and holds something else: names, sizes and cubins are not believed either."""
    path = tables.pack_of(written, next(iter(written.kernels)))
    content = xz.unpack(path.read_bytes(), kernel_pack.MAX_UNPACKED)
    for _, damaged in flips(content, step=7):
        path.write_bytes(xz.pack(damaged))
        found, said = attempt(written.folder)  # which compares what is offered
        assert len(said) == any(found.cubin(key) is None for key in found.kernels)


def test_shipped_kernels_with_a_bit_turned_are_a_miss(tmp_path):
    from marlin_gen import env

    shipped = DispatchTable.load(sorted(env.tuned_dir().glob(f"*/{FILE_NAME}"))[0].parent)
    key = min(shipped.kernels)
    content = shipped.cubin(key)
    assert content[:4] == b"\x7fELF"
    copy = shipped.write(tmp_path / "copy", sources=[shipped.folder])
    assert all(copy.cubin(key) == shipped.cubin(key) for key in shipped.kernels)
    path = tables.pack_of(copy, key)
    packed = path.read_bytes()
    for at, damaged in flips(packed, step=len(packed) // 50):
        path.write_bytes(damaged)
        with pytest.warns(TableWarning, match="are not used, but the next candidates"):
            assert DispatchTable.load(copy.folder).cubin(key) is None, at


def test_another_process_s_build_of_a_kernel_is_served_under_its_own_hash(written, tmp_path):
    """This process read the table before: what it offers to load is what lies there now, by that table's hash."""
    made = tables.artifact(tmp_path / "new", mma(), content=b"compiled again")
    publish(written.folder, DispatchTable.build(H100, [row(4096, 4096, 1, mma())], [made], {}), [made])
    location = Dispatcher(H100, [written]).locate(made.spec)
    assert location.image == b"compiled again"
    assert written.find(made.spec.key)[0].sha256 == hashlib.sha256(b"compiled again").hexdigest()


def test_a_kernel_that_another_process_dropped_is_no_fault(written, tmp_path):
    kept = tables.artifact(tmp_path / "new", mma(96))
    rows = [replace(r, plan=mma(96), default_plan=None, default_us=None) for r in written.rows]
    publish(written.folder, DispatchTable.build(H100, rows, [kept], {}), [kept])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(map(written.cubin, written.kernels))


def test_what_changes_after_it_was_judged_is_not_loaded(written):
    """The bytes that go to the driver are those that were judged, whatever becomes of their file."""
    key = next(iter(written.kernels))
    before = written.cubin(key)
    tables.damage(written, key)
    kernel = Dispatcher(H100, [written]).locate(KernelSpec.from_key(key))
    assert kernel.image == before == key.encode()


@pytest.mark.parametrize("kind", ["pipe", "folder", "large", "loop"])
def test_what_is_not_a_file_is_a_miss_and_nobody_waits(written, kind, monkeypatch):
    for path in (tables.pack_of(written, next(iter(written.kernels))), written.folder / FILE_NAME):
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        else:
            with open(path, "wb") as file:
                file.truncate(65 << 20)  # a hole: takes no room on the disk
        started = time.monotonic()
        found, said = attempt(written.folder)
        assert len(said) == 1 and time.monotonic() - started < 5
    assert found is None


def test_the_kernel_of_another_architecture_is_left_out(written, tmp_path):
    value = json.loads(written.text())
    del value["sha256"]
    key = next(iter(value["kernels"]))
    other = key.replace("sm_90a", "sm_80")
    value["kernels"][other] = value["kernels"].pop(key)
    (written.folder / FILE_NAME).write_text(seal(json.dumps(value)[1:]))
    found, said = attempt(written.folder)
    assert other not in found.kernels and "is for sm_80, this GPU runs sm_90a" in said[0]


def test_the_table_of_another_gpu_is_not_used(tmp_path):
    made = tables.table(tmp_path, ROWS, gpu=Gpu((9, 0), 78, 50 << 20, 228 << 10, 4000, "NVIDIA H20"))
    origins = {choice.origin for choice in Dispatcher(H100, [made]).choose(ASKED[0])}
    assert origins == {"default"}


# Archives.


def archive_of(found: DispatchTable, path: Path) -> bytes:
    table_archive.write_archive(path, [found])
    return path.read_bytes()


def unpacked(path: Path) -> str | None:
    """Open an archive and use what is in it; why it was refused, None if it was not."""
    try:
        with warnings.catch_warnings(record=True), table_archive.opened(path) as found:
            for table in found:
                attempt(table.folder)
    except ValueError as error:
        return str(error)
    return None


def test_an_archive_round_trips_and_is_the_same_each_time(written, tmp_path):
    one, two = archive_of(written, tmp_path / "a.zip"), archive_of(written, tmp_path / "b.zip")
    assert one == two
    with table_archive.opened(tmp_path / "a.zip") as (found,):
        assert found == replace(written, folder=found.folder) and found.intact() == found
        kept = found.folder
    assert not kept.exists()


def test_one_bit_anywhere_in_an_archive_is_refused_or_harmless(written, tmp_path):
    path = tmp_path / "a.zip"
    content = archive_of(written, path)
    for _, damaged in flips(content, step=5):
        path.write_bytes(damaged)
        unpacked(path)
    for length in range(0, len(content), 61):
        path.write_bytes(content[:length])
        assert unpacked(path) is not None


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "/etc/evil", "h100/../../evil/table.json", "h100/kernels/../../x.tar.xz", "h100/kernels/a/b.tar.xz",
        "..\\evil", "h100/table.json/", "table.json", "h100/kernels/x.tar.xz\0.txt", "h100/.lock",
        "h100/kernels/ü.tar.xz", "h100/kernels/x.cubin",
    ],
)  # fmt: skip
def test_names_that_a_table_has_not_are_refused(written, tmp_path, name):
    path = tmp_path / "inner" / "a.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{H100.slug}/{FILE_NAME}", written.text())
        entry = zipfile.ZipInfo("x")
        entry.filename = name  # writestr would have cleaned it
        archive.writestr(entry, b"evil")
    before = {p for p in tmp_path.rglob("*")}
    said = unpacked(path)
    assert said and "is not a file of a table" in said
    assert {p for p in tmp_path.rglob("*")} == before


def test_links_in_an_archive_are_only_bytes(written, tmp_path):
    path = tmp_path / "a.zip"
    key = next(iter(written.kernels))
    file = tables.pack_of(written, key).relative_to(written.folder)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{H100.slug}/{FILE_NAME}", written.text())
        link = zipfile.ZipInfo(f"{H100.slug}/{file}")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/hostname")
    with pytest.warns(TableWarning), table_archive.opened(path) as (found,):
        assert found.cubin(key) is None and not (found.folder / file).is_symlink()


def test_a_bomb_is_refused_before_it_unpacks(written, tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{H100.slug}/kernels/x.tar.xz", bytes(65 << 20))
    assert "is larger than" in unpacked(path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(20):
            archive.writestr(f"{H100.slug}/kernels/x{i}.tar.xz", b"")
    path.write_bytes(buffer.getvalue())
    monkeypatch.setattr(table_archive, "MAX_FILES", 10)
    assert "holds 20 files, 10 at most" in unpacked(path)


def test_the_same_name_twice_is_refused(written, tmp_path):
    path = tmp_path / "a.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr(f"{H100.slug}/{FILE_NAME}", written.text())
    assert "twice" in unpacked(path)


# Recordings.


@pytest.fixture(scope="module")
def lines() -> bytes:
    from marlin_gen.replay import shipped_recordings

    content = gzip.decompress(next(iter(shipped_recordings().values())).read_bytes()).splitlines(keepends=True)
    return b"".join(content[:: max(len(content) // 16, 1)])


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_recording_is_refused_or_harmless(lines, packed, tmp_path):
    path = tmp_path / "recording"
    content = gzip.compress(lines, mtime=0) if packed else lines
    path.write_bytes(content)
    whole = load_recording(path)
    assert whole.measurements
    for _, damaged in flips(content, step=2 if packed else 7):
        path.write_bytes(damaged)
        try:
            found = load_recording(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        table = DispatchTable(H100, (), {})
        subset.options_of(table, [found] if H100.same_class(found.gpu) else [], set())


def test_a_recording_that_unpacks_to_too_much_is_refused(tmp_path):
    path = tmp_path / "recording"
    path.write_bytes(gzip.compress(bytes(1 << 20)))
    with pytest.raises(ValueError, match="unpacks to more than 100000 bytes"):
        whole_files.read_unpacked(path, 100_000)


# Several processes.


def _tune(folder: Path, scratch: Path, sizes: list[int]) -> None:
    """What a tune does at its end, again and again; one kernel is compiled anew each time."""
    for n in sizes:
        plan = mma(block_n=32)
        made = [tables.artifact(scratch / f"tune{n}", plan, content=f"build {n}".encode())]
        publish(folder, DispatchTable.build(H100, [row(n, 4096, 1, plan)], made, {"n": n}), made)


def _import(folder: Path, archives: list[Path]) -> None:
    for path in archives:
        with table_archive.opened(path) as found:
            for table in found:
                publish(folder / table.gpu.slug, table.intact(), prefer="newer")


def _load(folder: Path, stop: Path, faults: Path) -> None:
    """What serving does: load, and ask for every kernel. A warning or exception is a fault."""
    loads = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            while not stop.exists() or not loads:
                for table in tables_below(folder):
                    for key in table.kernels:
                        table.cubin(key)
                loads += 1
        except BaseException as error:
            faults.write_text(f"after {loads} loads: {error!r}")


def _copy(folder: Path, target: Path, stop: Path, faults: Path) -> None:
    """Imports from the folder that others write to. A row or kernel that is not whole is a fault."""
    while not stop.exists():
        if (folder / H100.slug / FILE_NAME).exists() and main(["import", str(folder), "--to", str(target), "--json"]):
            faults.write_text("an import from a folder in use left rows out")


def test_processes_that_tune_import_and_load_at_once_lose_nothing(tmp_path):
    folder = tmp_path / "tuned"
    stop, faults = tmp_path / "stop", tmp_path / "faults"
    tuned = [64 * i for i in range(1, 41)]
    archives, imported = [], []
    for i in range(15):
        n = 64 * (100 + i)
        made = tables.table(tmp_path / f"source{i}", [row(n, 4096, 1, mma(block_n=16 + 16 * (i % 4)))])
        archives.append(tmp_path / f"{i}.zip")
        table_archive.write_archive(archives[-1], [made])
        imported.append(n)
    context = get_context("fork")
    readers = [
        context.Process(target=_load, args=(folder, stop, faults)),
        context.Process(target=_copy, args=(folder, tmp_path / "copy", stop, faults)),
    ]
    writers = [
        context.Process(target=_tune, args=(folder / H100.slug, tmp_path / "scratch", tuned)),
        context.Process(target=_import, args=(folder, archives[::2])),
        context.Process(target=_import, args=(folder, archives[1::2])),
    ]
    for process in (*readers, *writers):
        process.start()
    for process in writers:
        process.join(60)
    stop.touch()
    for process in readers:
        process.join(60)
    assert [process.exitcode for process in (*writers, *readers)] == [0] * 5
    assert not faults.exists(), faults.read_text()
    (found,) = tables_below(folder)
    assert [r.problem.n for r in found.rows] == sorted(tuned + imported)
    assert found.intact() == found
    (copied,) = tables_below(tmp_path / "copy")
    assert copied.intact() == copied and {r.problem for r in copied.rows} <= {r.problem for r in found.rows}


def _publish_for_ever(folder: Path, scratch: Path) -> None:
    for i in range(1_000_000):
        plan = mma(block_n=16 * (1 + i % 5))
        made = [tables.artifact(scratch / f"{i % 5}", plan)]
        publish(folder, DispatchTable.build(H100, [row(64 * (1 + i % 50), 4096, 1, plan)], made, {"i": i % 5}), made)


def test_a_writer_that_is_killed_leaves_the_old_table_or_the_new_one(tmp_path):
    """Every other kill comes when the writer has just begun a file, the others at any moment."""
    folder = tables.table(tmp_path, ROWS).folder
    generator = random.Random(0)
    interrupted = 0

    def begun() -> bool:
        return any(path.name != whole_files.LOCK_FILE for path in folder.rglob(".*"))

    for attempt in range(200):
        writer = get_context("fork").Process(target=_publish_for_ever, args=(folder, tmp_path / "scratch"))
        writer.start()
        time.sleep(0.05 + generator.random() * 0.05)
        ends = time.monotonic() + 1.0
        while attempt % 2 and not begun() and time.monotonic() < ends:
            pass
        writer.kill()
        writer.join()
        interrupted += begun()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = DispatchTable.load(folder)
            assert found.intact() == found and {r.problem for r in ROWS} <= {r.problem for r in found.rows}
        if attempt >= 11 and interrupted:
            break
    assert interrupted, "no kill came in the middle of a write; the test shows nothing"
    publish(folder, found)
    assert not [path for path in folder.rglob(".*") if path.name != whole_files.LOCK_FILE], "left-overs stay"


def test_a_lock_that_is_never_given_back_ends_in_an_error(tmp_path):
    with (
        whole_files.locked(tmp_path),
        pytest.raises(TimeoutError, match="has been held by another process"),
        whole_files.locked(tmp_path, seconds=0.1),
    ):
        pass


def test_serving_does_not_wait_for_a_writer_that_hangs(written, monkeypatch):
    monkeypatch.setattr("marlin_gen.table.READ_SECONDS", 0.1)
    tables.pack_of(written, next(iter(written.kernels))).write_bytes(b"damaged")
    with whole_files.locked(written.folder):
        started = time.monotonic()
        found, said = attempt(written.folder)
    assert found is not None and len(said) == 1 and time.monotonic() - started < 5


def test_readers_share_the_lock_and_need_none(tmp_path):
    with whole_files.locked(tmp_path / "nowhere", shared=True):
        pass
    with whole_files.locked(tmp_path):
        pass
    with whole_files.locked(tmp_path, shared=True), whole_files.locked(tmp_path, shared=True, seconds=0.1):
        pass


def test_nothing_that_executes_is_read(tmp_path):
    """The modules that read tables import no unpickler and evaluate nothing."""
    package = Path(table_archive.__file__).parent
    names = ("table", "table_file", "table_row", "table_archive", "whole_files", "record", "dispatch", "ranks")
    for name in (*names, "shipped_ptx"):
        text = (package / f"{name}.py").read_text()
        assert not re.search(r"(import|from) (pickle|marshal|shelve)|\b(eval|exec)\(|torch\.load|_object\(", text), name
