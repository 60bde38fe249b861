# One image for server, client and operator.
#
#   docker build --tag fedlora .
#   docker build --tag fedlora:gpu --build-arg TORCH=cuda .
#
# TORCH   cpu, or cuda for the wheel of the package index, which brings CUDA
# EXTRAS  optional dependencies of pyproject.toml, by comma
ARG PYTHON=python:3.11-slim

FROM ${PYTHON} AS builder
ARG TORCH=cpu
ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv --without-pip /opt/fedlora
WORKDIR /build

# a layer of its own, since it is large and changes seldom; a wheel that pip is configured to
# find is taken before the index of CPU wheels
COPY constraints.txt ./
RUN set -eu; torch=$(grep '^torch==' constraints.txt); \
    install="python3 -m pip --python /opt/fedlora/bin/python install --no-compile --no-deps"; \
    case "$TORCH" in \
    cpu) $install --no-index "$torch" \
        || $install --index-url https://download.pytorch.org/whl/cpu "$torch" ;; \
    cuda) PIP_FIND_LINKS="" $install "$torch" ;; \
    *) echo "TORCH=$TORCH: expected cpu or cuda" >&2; exit 2 ;; \
    esac

# what it stands on, so that a change of the code alone installs none of it again
COPY pyproject.toml docker/requirements.py ./
RUN python3 requirements.py pyproject.toml "$EXTRAS" > requirements.txt \
    && python3 -m pip --python /opt/fedlora/bin/python install --no-compile \
        --constraint constraints.txt --requirement requirements.txt \
    && cd /opt/fedlora/lib/python3*/site-packages \
    && find . -type d \( -name tests -o -name include -o -path ./torch/test \) \
        -prune -exec rm -r {} + \
    && python3 -m compileall -q -j 0 -x '/py31[2-9]_' /opt/fedlora/lib

COPY README.md LICENSE ./
COPY fedlora fedlora
COPY server server
COPY client client
COPY protos protos
COPY strategies strategies
COPY simulation simulation
RUN python3 -m pip wheel --no-deps --wheel-dir /wheels . \
    && python3 -m pip --python /opt/fedlora/bin/python install --no-deps --compile /wheels/*.whl


FROM ${PYTHON}
ARG VERSION=0.1.0
ARG REVISION=""
LABEL org.opencontainers.image.title="fedlora" \
    org.opencontainers.image.description="Federated fine-tuning of transformers with low-rank adapters" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
# every folder that a volume may cover belongs to the user, since a new volume takes its owner
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin \
        fedlora \
    && install -d -o fedlora -g fedlora -m 0750 \
        /var/lib/fedlora /var/cache/fedlora /enrol /operator /runs
COPY --from=builder /opt/fedlora /opt/fedlora
COPY docker/server.sh docker/run.sh docker/healthy.py /usr/local/lib/fedlora/
ENV PATH=/opt/fedlora/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    FLWR_HOME=/tmp/flwr \
    MPLCONFIGDIR=/tmp/matplotlib \
    HF_HOME=/var/cache/fedlora
USER 10001:10001
WORKDIR /
ENTRYPOINT ["fedlora"]
