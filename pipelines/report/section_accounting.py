"""The report's row-count reconciliation.

It shows how many rows of every table were kept or left out, and why.
"""

from dataclasses import dataclass

from pipelines.report.data import Reason, Work, count_reasons
from pipelines.report.labels import OUTCOMES, SPLIT_WORDS, phrase

EXAMPLES_PER_REASON = 3


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a funnel.

    It has the rows that remain before it, and those that it removes. Shares are of the rows that
    came in.
    """

    name: str
    meaning: str
    rows: int
    offset: float
    share: float
    kind: str


@dataclass(frozen=True, kw_only=True)
class TableAccounting:
    """The row counts of one table of one stage."""

    stage: str
    table: str
    rows_in: int
    rows_out: int
    exclusions: dict[str, int]

    @property
    def balances(self) -> bool:
        """Return whether every row that came in is accounted for."""
        return self.rows_in == self.rows_out + sum(self.exclusions.values())


def table_accounting(work: Work) -> list[TableAccounting]:
    """List the row counts of all tables and stages."""
    found = []
    for stage, manifest in work.manifests.items():
        for table, counts in sorted(manifest.counts.items()):
            exclusions = {name: rows for name, rows in counts.items() if name not in ("in", "out") and rows}
            order = sorted(
                exclusions, key=lambda name: (list(OUTCOMES).index(name) if name in OUTCOMES else len(OUTCOMES), name)
            )
            found.append(
                TableAccounting(
                    stage=stage,
                    table=table,
                    rows_in=counts.get("in", 0),
                    rows_out=counts.get("out", 0),
                    exclusions={name: exclusions[name] for name in order},
                )
            )
    return found


def click_funnel(work: Work) -> list[Step] | None:
    """Follow the clicks down to training examples.

    Shown are the rows that came in, those that each reason removed, and those left.
    """
    manifest = work.manifests.get("shards")
    if manifest is None or "clicks" not in manifest.counts:
        return None
    account = next(
        account for account in table_accounting(work) if account.stage == "shards" and account.table == "clicks"
    )
    total = max(account.rows_in, 1)
    steps = [
        Step(
            name="clicks read",
            meaning="every row of the click log",
            rows=account.rows_in,
            offset=0.0,
            share=1.0,
            kind="in",
        )
    ]
    left = account.rows_in
    for name, rows in account.exclusions.items():
        left -= rows
        steps.append(
            Step(
                name=phrase(name),
                meaning=OUTCOMES.get(name, ""),
                rows=-rows,
                offset=left / total,
                share=rows / total,
                kind="lost",
            )
        )
    steps.append(
        Step(
            name="examples kept",
            meaning="one per listing clicked in a session",
            rows=account.rows_out,
            offset=0.0,
            share=account.rows_out / total,
            kind="out",
        )
    )
    return steps


def splits(work: Work) -> list[Step]:
    """List the examples by split, in order of time."""
    manifest = work.manifests.get("shards")
    found: dict[str, int] = manifest.summary.get("examples", {}) if manifest else {}
    total = max(sum(found.values()), 1)
    order = sorted(found, key=lambda name: list(SPLIT_WORDS).index(name) if name in SPLIT_WORDS else len(SPLIT_WORDS))
    return [
        Step(
            name=phrase(name),
            meaning=SPLIT_WORDS.get(name, ""),
            rows=found[name],
            offset=0.0,
            share=found[name] / total,
            kind=f"split-{name}",
        )
        for name in order
    ]


def reasons(work: Work) -> dict[str, list[Reason]]:
    """List rejects and defects by reason."""
    return {table: count_reasons(work.manifests, table, EXAMPLES_PER_REASON) for table in ("rejects", "defects")}
