# The demo on a CPU: a vector is trained for the embedded model, scored with stock lm_eval, and compared.
#   docker build -t lm-eval-aft . && docker run --name aft-demo lm-eval-aft
#   docker cp aft-demo:/aft/demo-results .
# Any command: docker run --rm lm-eval-aft .venv/bin/aft --help
FROM python:3.11-slim

# torch's build without CUDA; the release is that of the Makefile.
ARG TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home aft && install -d -o aft /aft
USER aft
WORKDIR /aft
COPY --chown=aft . .
RUN make setup TORCH="$TORCH" && rm -rf ~/.cache/pip
CMD ["make", "demo"]
