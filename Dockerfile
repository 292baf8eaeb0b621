# A plain image with the command line and the server. CPU by default:
#   docker build -t gradmap .                           vLLM's CPU build
#   docker build -t gradmap --build-arg EXTRA=gpu .     vLLM for CUDA (run with --gpus all)
#   docker run --rm -p 8000:8000 -v "$PWD/out/demo/vllm:/model:ro" gradmap
FROM python:3.11-slim

ARG EXTRA=cpu
# vLLM's CPU build compiles kernels at its first start and needs a C++ compiler for that.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home gradmap
WORKDIR /opt/gradmap
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY gradmap gradmap
COPY export export
COPY serving serving
COPY loadtest loadtest
RUN pip install --no-cache-dir uv \
 && case "$EXTRA" in \
      cpu) uv pip install --system --no-cache --torch-backend cpu '.[cpu]' --constraints constraints/cpu.txt ;; \
      *) uv pip install --system --no-cache ".[$EXTRA]" ;; \
    esac

USER gradmap
WORKDIR /home/gradmap
ENV HF_HUB_OFFLINE=1
EXPOSE 8000
# Inside a container, loopback cannot be reached: listen on all of the container's addresses, publish what you need.
ENTRYPOINT ["gradmap-serve", "--host", "0.0.0.0"]
CMD ["/model"]
