# syntax=docker/dockerfile:1
#   docker build -t batchcap .
#   docker run --rm -u "$(id -u)" -v "$PWD/images:/images:ro" -v "$PWD/out:/out" \
#     --read-only --tmpfs /tmp --cap-drop=ALL --network=none \
#     batchcap run /images /out/captions.parquet

FROM python:3.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/batchcap
# The dependencies change seldom: a layer of their own.
COPY requirements.lock /src/
RUN /opt/batchcap/bin/pip install --require-hashes --only-binary=:all: --no-binary=jieba \
    -r /src/requirements.lock
COPY pyproject.toml README.md LICENSE /src/
COPY batchcap /src/batchcap
RUN /opt/batchcap/bin/pip install --no-deps /src

FROM python:3.12-slim-bookworm
RUN useradd --uid 10001 --create-home batchcap
COPY --from=build /opt/batchcap /opt/batchcap
ENV PATH=/opt/batchcap/bin:$PATH XDG_CACHE_HOME=/tmp/cache
USER 10001
WORKDIR /tmp
ENTRYPOINT ["batchcap"]
