"""The table of what was tortured, one row a part; each row says when and at which commit it was run."""

from __future__ import annotations

from bench.records import RESULTS, Table, made, read, save_table

NAME = "torture"
PARTS = {
    "kills": "SIGKILL at a random time or change to the disk, then the same command again",
    "pairs": "two commands at once on one store and one output, every second pair in PID namespaces of their own",
    "disk": "no room at every tenth change to the disk, and below the size of every file of the result",
    "fuzz": "one mutated file and the commands that read it",
    "load": "one request to two experts behind one endpoint",
}
COLUMNS = ("part", "a trial", "trials", "broke", "minutes", "commit", "date")


def save_row(part: str, trials: int, broken: int, seconds: float) -> None:
    """Add the numbers of one run to the row of its part and commit; the other rows stay."""
    how = made()
    path = RESULTS / f"{NAME}.json"
    rows = {(row[0], row[5]): row for row in read(path)["rows"]} if path.is_file() else {}
    commit, date = (", ".join(how[key]) for key in ("commits", "dates"))
    if before := rows.get((part, commit)):  # another seed
        trials += int(before[2].replace(",", ""))
        broken += int(before[3])
        seconds += 60 * float(before[4])
    rows[part, commit] = [part, PARTS[part], f"{trials:,}", str(broken), f"{seconds / 60:.1f}", commit, date]
    chosen = [row for each in PARTS for row in rows.values() if row[0] == each]
    save_table(NAME, Table(COLUMNS, chosen), how, "Last run:")
