"""What a row of results says of its origin."""

import jax

from longctx.provenance import SETTINGS, origin, read_rows, write_rows


def test_rows_keep_what_they_hold_and_say_where_they_come_from(tmp_path, monkeypatch):
    jax.devices()  # before the flags below, which XLA does not know
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    monkeypatch.setenv("XLA_FLAGS", "--a --b")
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, [{"a": 1}, {"a": None}])
    rows = read_rows(path)
    assert [row["a"] for row in rows] == [1, None]
    command = rows[0]["command"]
    assert command.startswith("XLA_FLAGS='--a --b' GLIBC_TUNABLES=glibc.malloc.arena_max=1")
    assert rows[0]["device"] == "cpu"
    assert rows[0]["versions"]["jax"]

    monkeypatch.delenv("XLA_FLAGS")
    assert origin()["command"].startswith("GLIBC_TUNABLES=")
