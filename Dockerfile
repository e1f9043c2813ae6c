# The SDK harness with CameNN in it, for Dataflow's workers and for Flink's DOCKER environment. How to build and use it: docs/guides/dataflow.md.
ARG PYTHON=3.11
ARG BEAM=2.77.0
FROM apache/beam_python${PYTHON}_sdk:${BEAM} AS beam

# Not Beam's own image: its preinstalled libraries are of other versions than constraints.txt, to which workers are held.
FROM python:${PYTHON}-slim
WORKDIR /opt/camenn

# Libraries first, in layers that a change of the project leaves as they are: with no package beside it, setup.py installs what the packages need.
COPY setup.py pyproject.toml constraints.txt ./
# torch brings the CUDA that it was built for. For older drivers, or without CUDA, give pip the index that has such builds: "--extra-index-url URL".
ARG TORCH_PIP_FLAGS=
RUN pip install --no-cache-dir -c constraints.txt $TORCH_PIP_FLAGS torch torchvision
RUN pip install --no-cache-dir -c constraints.txt ".[gcp,aws]"

COPY schemas schemas
COPY camenn_model camenn_model
COPY pipelines pipelines
COPY simulator simulator
COPY benchmarks benchmarks
COPY examples examples
RUN pip install --no-cache-dir --no-deps --force-reinstall . && pip check

# From here on the installed package is found, not the copy above: a package that is staged with a job must be able to replace it.
WORKDIR /

# Hub names of weights to bake in, both or neither. Workers then ask no hub for them.
ARG IMAGE_WEIGHTS=
ARG TEXT_ENCODER=
ENV HF_HOME=/opt/camenn/hub
RUN if [ -n "$IMAGE_WEIGHTS" ]; then \
    python -c "import sys; from camenn_model.encoders import text_models as t, weights as w; print(w.find_image_weights(sys.argv[1]), t.find_text_encoder(sys.argv[2]))" "$IMAGE_WEIGHTS" "$TEXT_ENCODER"; \
    fi
ENV HF_HUB_OFFLINE=${IMAGE_WEIGHTS:+1}

# Where Dataflow puts the NVIDIA driver.
ENV PATH=/usr/local/nvidia/bin:$PATH LD_LIBRARY_PATH=/usr/local/nvidia/lib64
# A process for each core computes with one thread, and threads that wait sleep.
ENV OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

COPY --from=beam /opt/apache/beam /opt/apache/beam
ENTRYPOINT ["/opt/apache/beam/boot"]
