"""The list of plausible bugs fits the code: a mutation whose snippet is gone would insert no bug,
and count as if no test noticed it.
"""

import dataclasses
from collections import Counter

from scripts.mutate import find_stale
from scripts.mutations import MUTATIONS


def test_every_mutation_can_be_planted() -> None:
    assert find_stale(MUTATIONS) == []


def test_every_room_that_is_mutated_is_so_in_several_ways() -> None:
    of_rooms = Counter(mutation.file.rpartition("/")[0] for mutation in MUTATIONS)
    assert len(MUTATIONS) >= 120 and min(of_rooms.values()) >= 5, of_rooms


def test_mutations_that_cannot_be_planted_are_told() -> None:
    sound = MUTATIONS[0]
    for change, reported in (
        ({"old": "no such snippet"}, "0 times, not once"),
        ({"old": "import"}, "times, not once"),
        ({"file": "pipelines/no_such_module.py"}, "0 times, not once"),
        ({"new": sound.old}, "is the same"),
        ({"tests": ()}, "no test should notice"),
        ({"tests": ("tests/architecture/test_mutations.py::test_that_is_not_there",)}, "there is no test"),
        ({"tests": ("tests/no_such_file.py",)}, "there is no test"),
    ):
        (fault,) = find_stale([dataclasses.replace(sound, **change)])
        assert fault.startswith(f"{sound.id}: ") and reported in fault
    assert find_stale([sound, sound]) == [f"{sound.id}: the id stands twice"]
