# docker build -f containers/cuda.Dockerfile -t backbench:cuda .
# docker run --rm --gpus all -v "$PWD/runs:/work/runs" backbench:cuda run --workload sharegpt --backend triton
#
# PyPI's torch brings its CUDA libraries; the host needs NVIDIA's driver and container toolkit only.
# Triton compiles its launchers with the C compiler of the image.
FROM python:3.12-slim
ARG EXTRA=flash
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY . /backbench
RUN python -m pip install --no-cache-dir -c /backbench/constraints.txt "/backbench[$EXTRA]"
WORKDIR /work
ENTRYPOINT ["bench"]
