# Both services and the command line, with the shipped model. Build: docker build -t cairn .
# The arguments are for the CPU; deploy/compose.gpu.yaml sets them for a GPU.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

ARG PACKAGES=""
RUN [ -z "${PACKAGES}" ] || { apt-get update && apt-get install -y --no-install-recommends ${PACKAGES} \
    && rm -rf /var/lib/apt/lists/*; }

# torch goes first and, for the CPU, from its own index: what asks for it later then pulls no CUDA packages.
ARG TORCH="torch==2.13.0"
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "${TORCH}" ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"}

# The user's number is fixed: secrets and volumes made outside can belong to it.
RUN useradd --system --uid 999 --create-home cairn \
    && install --directory --owner cairn --mode 0700 /var/lib/cairn /var/cache/cairn

WORKDIR /opt/cairn
COPY pyproject.toml setup.py README.md LICENSE ./
COPY protos protos
COPY chunk_store chunk_store
COPY text text
COPY engine engine
COPY serving serving
COPY prefill_service prefill_service
COPY decode_service decode_service
COPY cairn cairn
COPY gateway gateway
ARG EXTRAS=redis,http
# Where it stands: `python -m prefill_service` finds its rooms here.
RUN pip install --no-cache-dir --editable ".[server,${EXTRAS}]"
COPY models/fable models/fable

USER cairn
# The root filesystem may be read-only: downloaded models and compiled kernels go to the cache's volume.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/var/cache/cairn HF_HOME=/var/cache/cairn/huggingface TRITON_CACHE_DIR=/var/cache/cairn/triton
VOLUME /var/lib/cairn
HEALTHCHECK --interval=10s --timeout=15s --start-period=600s CMD ["cairn", "health"]
CMD ["cairn", "up", "--model", "/opt/cairn/models/fable", "--store", "file:///var/lib/cairn", "--host", "0.0.0.0", "--insecure"]
