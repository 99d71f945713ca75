# docker build -f containers/rocm.Dockerfile -t backbench:rocm .
# docker run --rm --device /dev/kfd --device /dev/dri --group-add video --security-opt seccomp=unconfined \
#     -v "$PWD/runs:/work/runs" backbench:rocm run --workload sharegpt --backend triton
#
# AMD's image brings ROCm, torch, its triton and amdsmi. The image's own torch is made a constraint, so that
# pip cannot put PyPI's, which is a CUDA build, in its place; the last line of the RUN fails if it did.
ARG BASE=rocm/pytorch:latest
FROM ${BASE}
COPY . /backbench
RUN python -c "import torch; print('torch==' + torch.__version__)" > /torch.txt \
    && python -m pip install --no-cache-dir -c /torch.txt "/backbench[rocm]" \
    && python -c "import torch; assert torch.version.hip, 'this torch is no ROCm build'"
WORKDIR /work
ENTRYPOINT ["bench"]
