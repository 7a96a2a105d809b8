# Builds the worker's image: the wheel in one stage, only what running it needs in the other.
FROM python:3.12-slim AS build
WORKDIR /source
RUN pip install --no-cache-dir build
COPY . .
RUN python -m build --wheel --outdir /wheels

FROM python:3.12-slim
LABEL org.opencontainers.image.title="inferbus" \
      org.opencontainers.image.description="Model predictions for event-driven systems" \
      org.opencontainers.image.licenses="Apache-2.0"
# Extras of the image; `--build-arg EXTRAS=kafka` leaves out what you do not run.
ARG EXTRAS=all
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(ls /wheels/*.whl)[${EXTRAS}]"
# No bytecode is written and no home folder is needed: the root file system may be read-only.
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 INFERBUS_LOG=json HOME=/tmp
USER 10001:10001
WORKDIR /pipeline
EXPOSE 8080
# Dead only when /livez says so: a worker whose broker is away is alive, and restarting it would not help.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/livez', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["inferbus"]
CMD ["run", "pipeline.yaml", "--set", "http.host=0.0.0.0"]
