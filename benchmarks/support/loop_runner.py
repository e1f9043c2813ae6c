"""The plain functions of a pipeline, called in a loop.

It is the reference for Beam's overhead.

It is a runner in name only: it takes the same transforms from the same pipeline and calls their
functions in one process, with lists for collections and a dictionary for each shuffle. Nothing is
encoded: tables go through a shuffle unchanged, not as Arrow IPC bytes, and there are no bundles,
coders or workers. Only the transforms of this project's stages are supported.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import apache_beam as beam
import pyarrow as pa
from apache_beam.ml.inference.base import RunInference
from apache_beam.pipeline import AppliedPTransform
from apache_beam.runners.runner import PipelineResult, PipelineRunner, PipelineState
from apache_beam.utils.windowed_value import WindowedValue

from pipelines.io import files
from pipelines.io.shuffle import ShuffleByBucket, split_by_bucket

_FROM_BYTES = files.ipc_table


building_seconds = 0.0
"""From the runner's construction, before the first transform, to the call to run: time that a program
without Beam would not spend."""


class LoopRunner(PipelineRunner):
    """`--runner=benchmarks.support.loop_runner.LoopRunner`."""

    def __init__(self) -> None:
        super().__init__()
        self.made = time.monotonic()

    def run_pipeline(self, pipeline: beam.Pipeline, options: Any) -> "_Done":
        """Call every step in this process."""
        global building_seconds
        building_seconds += time.monotonic() - self.made
        with (
            mock.patch.object(files, "ipc_bytes", lambda table, compression="": table),
            mock.patch.object(
                files, "ipc_table", lambda data: data if isinstance(data, pa.Table) else _FROM_BYTES(data)
            ),
        ):
            _Loop(pipeline).run()
        return _Done(PipelineState.DONE)


class _Done(PipelineResult):
    def __init__(self, state: str) -> None:
        super().__init__(state)  # type: ignore[no-untyped-call]  # Beam's own has no annotations

    def wait_until_finish(self, duration: int | None = None) -> str:
        return self.state


class _Loop:
    """One run of a pipeline.

    It holds the elements of each collection until its last reader has had them.
    """

    def __init__(self, pipeline: beam.Pipeline) -> None:
        self.elements: dict[Any, list[Any]] = {}
        self.steps: list[tuple[AppliedPTransform, Callable[[AppliedPTransform], None]]] = []
        self._collect(pipeline._root_transform())
        self.readers = Counter(source for step, _ in self.steps for source in self._sources(step))

    def run(self) -> None:
        for step, work in self.steps:
            work(step)
            for source in self._sources(step):
                self.readers[source] -= 1
                if not self.readers[source]:
                    del self.elements[source]

    def _collect(self, node: AppliedPTransform) -> None:
        """Collect the steps in the pipeline's own order.

        That order is executable: a transform is applied to existing collections.
        """
        kinds: list[tuple[type, Callable[[AppliedPTransform], None]]] = [
            (beam.Create, self._create),
            (beam.Reshuffle, self._pass),
            (beam.Flatten, self._pass),
            (ShuffleByBucket, self._shuffle),
            (RunInference, self._infer),
            (beam.GroupByKey, self._group),
            (beam.ParDo, self._loop),
        ]
        work = next((work for kind, work in kinds if isinstance(node.transform, kind)), None)
        if work is not None:
            self.steps.append((node, work))
        elif node.parts:
            for part in node.parts:
                self._collect(part)
        elif node.transform is not None and set(node.outputs.values()) - set(node.inputs):
            raise NotImplementedError(
                f"{node.full_label}: the plain loop does not know {type(node.transform).__name__}"
            )

    @staticmethod
    def _sources(step: AppliedPTransform) -> list[Any]:
        read = [*step.inputs, *(side.pvalue for side in step.side_inputs)]
        return [source for source in read if isinstance(source, beam.PCollection)]

    def _keep(self, step: AppliedPTransform, elements: list[Any], tag: str | int | None = None) -> None:
        # A tag's elements may have no reader.
        if tag in step.outputs and self.readers[step.outputs[tag]]:
            self.elements[step.outputs[tag]] = elements

    def _create(self, step: AppliedPTransform) -> None:
        created: Any = step.transform
        self._keep(step, list(created.values))

    def _pass(self, step: AppliedPTransform) -> None:
        self._keep(step, [element for source in step.inputs for element in self.elements[source]])

    def _group(self, step: AppliedPTransform) -> None:
        groups: dict[Any, list[Any]] = {}
        for key, value in self.elements[step.inputs[0]]:
            groups.setdefault(key, []).append(value)
        self._keep(step, list(groups.items()))

    def _shuffle(self, step: AppliedPTransform) -> None:
        """Shuffle by bucket.

        This is `split_by_bucket` and concatenation of the pieces, as tables throughout.
        """
        shuffle: Any = step.transform
        buckets: dict[int, dict[str, list[pa.Table]]] = {}
        for (kind, column), source in zip(shuffle.kinds.items(), step.inputs, strict=True):
            for table in self.elements[source]:
                for number, piece in split_by_bucket(table, column, shuffle.buckets):
                    buckets.setdefault(number, {}).setdefault(kind, []).append(piece)
        self._keep(
            step,
            [(number, {kind: pa.concat_tables(p) for kind, p in kinds.items()}) for number, kinds in buckets.items()],
        )

    def _infer(self, step: AppliedPTransform) -> None:
        inference: Any = step.transform
        handler = inference._model_handler
        model = handler.load_model()
        self._keep(
            step,
            [result for chunk in self.elements[step.inputs[0]] for result in handler.run_inference([chunk], model)],
        )

    def _loop(self, step: AppliedPTransform) -> None:
        """Pass each element through the DoFn."""
        called: Any = step.transform
        fn: beam.DoFn = called.fn
        given, named = called.raw_side_inputs
        values = {id(side): self.elements[side.pvalue] for side in step.side_inputs}
        arguments = [values.get(id(value), value) for value in given]
        keywords = {name: values.get(id(value), value) for name, value in named.items()}
        found: dict[str | int | None, list[Any]] = {tag: [] for tag in step.outputs}

        def take(results: Iterable[Any] | None) -> None:
            for result in results or ():
                tag = None
                if isinstance(result, beam.pvalue.TaggedOutput):
                    tag, result = result.tag, result.value
                found[tag].append(result.value if isinstance(result, WindowedValue) else result)

        fn.setup()
        take(fn.start_bundle())
        for element in self.elements[step.inputs[0]]:
            take(fn.process(element, *arguments, **keywords))
        take(fn.finish_bundle())
        fn.teardown()
        for tag, elements in found.items():
            self._keep(step, elements, tag)
