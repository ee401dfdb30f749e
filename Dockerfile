# The command in a container, on a CPU; for an NVIDIA GPU build with --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130.
#   docker build -t kalmagrove .
#   docker run --rm -v "$PWD:/data" kalmagrove train --data book.txt --out runs/book
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=2.13.0

COPY pyproject.toml README.md LICENSE constraints.txt /source/
COPY src /source/src
# The constraints pin torch's plain version, whichever build of it is installed before.
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch==$TORCH" \
    && pip install --no-cache-dir --constraint /source/constraints.txt "/source[data]" \
    && rm -r /source \
    && useradd --create-home user

USER user
WORKDIR /data
ENTRYPOINT ["kalmagrove"]
CMD ["--help"]
