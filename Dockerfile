# Both services and the command line on the CPU, with the shipped model. Build: docker build -t cairn .
FROM python:3.11-slim

# torch goes first and from its own index: what asks for it later then pulls no CUDA packages.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "torch==2.13.0" --index-url "${TORCH_INDEX}"

WORKDIR /opt/cairn
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY chunk_store chunk_store
COPY engine engine
COPY serving serving
COPY prefill_service prefill_service
COPY decode_service decode_service
COPY cairn cairn
RUN pip install --no-cache-dir ".[redis]"
COPY models/fable models/fable

# The store's directory belongs to the user, so that a fresh named volume does too.
RUN useradd --system --create-home cairn && mkdir /var/lib/cairn && chown cairn: /var/lib/cairn
USER cairn
ENV PYTHONUNBUFFERED=1
VOLUME /var/lib/cairn
CMD ["cairn", "up", "--model", "/opt/cairn/models/fable", "--store", "file:///var/lib/cairn", "--host", "0.0.0.0"]
