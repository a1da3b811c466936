# The one image: controller, workers, CSI driver and command line.
#
#   docker build -t registry.example/datacache:1.0 .        # or: make image IMAGE=registry.example/datacache:1.0
#
# BASE is a Debian 12 with Python 3.11 or newer (python3 and python3-venv, if it is Debian's own). Packages of
# Python are those of requirements/, each held against its hash. An index of your own, and its certificate,
# are secrets of the build and reach no layer:
#
#   --secret id=pip,src=pip.conf --secret id=ca,src=ca.pem        # pip.conf: [global] cert = /run/secrets/ca
#
# Built and tested on amd64; arm64 is untested.
ARG BASE=docker.io/library/python:3.13-slim-bookworm

FROM ${BASE} AS build
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      gcc libc6-dev libfuse3-dev pkg-config python3-dev >/dev/null \
 && python3 -m venv /build \
 && python3 -m venv --without-pip /opt/datacache
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_QUIET=1
COPY requirements /src/requirements
# What goes at the end is the Kubernetes client's other half, for asyncio: 68 MB that nobody here imports.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    /build/bin/pip install --require-hashes -r /src/requirements/build.lock \
 && /build/bin/pip wheel --no-build-isolation --require-hashes -w /wheels -r /src/requirements/run.lock \
 && /build/bin/pip --python /opt/datacache install --no-index --no-deps /wheels/*.whl \
 && rm -rf /wheels /opt/datacache/lib/python3*/site-packages/kubernetes/aio
COPY pyproject.toml README.md LICENSE /src/
COPY datacache /src/datacache
COPY fuse /src/fuse
COPY csi /src/csi
RUN /build/bin/pip wheel --no-build-isolation --no-index --no-deps -w /wheels /src \
 && /build/bin/pip --python /opt/datacache install --no-index --no-deps /wheels/*.whl

FROM ${BASE}
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libfuse3-3 >/dev/null \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
 && echo datacache:x:65532:65532::/tmp:/usr/sbin/nologin >> /etc/passwd
COPY --from=build /opt/datacache /opt/datacache
ENV PATH=/opt/datacache/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# The controller needs no more. Workers and the CSI driver, who mount, are root by what their pods say.
USER 65532:65532
ENTRYPOINT ["datacache"]
