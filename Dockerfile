# gradmap's command line and server. Models are mounted, not baked in.
#   docker build --target cpu -t gradmap:cpu .      vLLM's CPU build
#   docker build --target cuda -t gradmap:cuda .    on vLLM's image (run with --gpus all --ipc host)
#   openssl rand -hex 32 > out/key                  user 1000, which the server is, must be able to read it
#   docker run --rm --read-only --tmpfs /tmp --shm-size 1g -p 127.0.0.1:8000:8000 \
#              -v "$PWD/out/demo/vllm:/model:ro" -v "$PWD/out/key:/run/secrets/api-key:ro" gradmap:cpu
# Without a key it refuses to start, unless it is told to serve whoever asks: gradmap:cpu /model --allow-anonymous
# Other commands: docker run --entrypoint gradmap ... gradmap:cpu prune ...

FROM debian:12.12-slim@sha256:d5d3f9c23164ea16f31852f95bd5959aad1c5e854332fe00f7b3a20fcc9f635c AS base
# Debian keeps no old versions, so that versions pinned here would soon not be found.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates libnuma1 python3 \
 && rm -rf /var/lib/apt/lists/*


FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/uv \
 && /opt/uv/bin/pip install --no-cache-dir uv==0.13.9 \
 && python3 -m venv --without-pip /opt/gradmap
WORKDIR /src
COPY constraints constraints
COPY pyproject.toml README.md LICENSE ./
COPY gradmap gradmap
COPY export export
COPY serving serving
COPY loadtest loadtest
# From where torch's CPU build is taken; where UV_FIND_LINKS has it, an empty one.
ARG TORCH_BACKEND=--torch-backend=cpu
RUN /opt/uv/bin/uv pip install --no-cache --python /opt/gradmap $TORCH_BACKEND '.[cpu]' --constraints constraints/cpu.txt


FROM base AS cpu
COPY --from=build /opt/gradmap /opt/gradmap
RUN useradd --uid 1000 --create-home gradmap
USER 1000
# All that is written goes to /tmp, so that the rest can be read-only.
ENV PATH=/opt/gradmap/bin:$PATH HOME=/tmp HF_HUB_OFFLINE=1
EXPOSE 8000 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m \
  CMD ["python3", "-c", "from urllib.request import *; build_opener(ProxyHandler({})).open('http://127.0.0.1:9000/readyz', timeout=4)"]
# Inside a container, loopback cannot be reached: listen on all of its addresses, and publish what you need.
ENTRYPOINT ["gradmap-serve", "--host", "0.0.0.0", "--admin-host", "0.0.0.0", "--log", "-", \
            "--api-key-file", "/run/secrets/api-key"]
# Eager, because to compile the model takes a C++ compiler, which is not in this image.
CMD ["/model", "--", "--enforce-eager"]


# A tag can be moved: `docker buildx imagetools inspect` says the digest to pin where your policy asks for one.
FROM vllm/vllm-openai:v0.32.0 AS cuda
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY gradmap gradmap
COPY export export
COPY serving serving
COPY loadtest loadtest
# vLLM, torch and transformers are there, in the versions that this vLLM wants.
RUN uv pip install --system --no-cache . \
 && (getent passwd 1000 || useradd --uid 1000 --create-home gradmap)
USER 1000
ENV HOME=/tmp HF_HUB_OFFLINE=1
EXPOSE 8000 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m \
  CMD ["python3", "-c", "from urllib.request import *; build_opener(ProxyHandler({})).open('http://127.0.0.1:9000/readyz', timeout=4)"]
ENTRYPOINT ["gradmap-serve", "--host", "0.0.0.0", "--admin-host", "0.0.0.0", "--log", "-", \
            "--api-key-file", "/run/secrets/api-key"]
CMD ["/model"]
