# The one image of csi-vduse: controller, node plugin, agent, workers, and the kubectl plugin.
#
#   buildah bud --tag docker.io/csivduse/csi-vduse:0.1.0 .     (or docker build)
#
# A stage with compilers makes a virtual environment; the image gets that, the libraries that the engine is
# linked with, and the tools that the node plugin runs. Base images are pinned by BASE: give a digest to build
# the same again.
ARG BASE=docker.io/library/debian:trixie-slim

FROM ${BASE} AS build
RUN apt-get update && apt-get install --yes --no-install-recommends \
        python3 python3-venv python3-dev gcc g++ libc6-dev make pkg-config liburing-dev libssl-dev linux-libc-dev \
        ca-certificates
RUN python3 -m venv /opt/csi-vduse
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csi_vduse ./csi_vduse
# Nothing of the Kubernetes client's models and calls is imported: compiled they would be a fifth of the image.
RUN /opt/csi-vduse/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check . \
    && /opt/csi-vduse/bin/pip uninstall --yes pip \
    && find /opt/csi-vduse -type d -name tests -path '*/site-packages/*' -prune -exec rm -rf {} + \
    && python3 -m compileall -q -j 0 -x '/kubernetes/.*client/(models|api)/' /opt/csi-vduse

FROM ${BASE}
# mount, mkfs and the like for the node plugin; modprobe for the agent's init container.
RUN apt-get update && apt-get install --yes --no-install-recommends \
        python3 liburing2 libssl3t64 libseccomp2 util-linux mount kmod e2fsprogs xfsprogs btrfs-progs ca-certificates \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
    && ln -s /opt/csi-vduse/bin/csi-vduse /opt/csi-vduse/bin/kubectl-vduse /usr/local/bin/
COPY --from=build /opt/csi-vduse /opt/csi-vduse
COPY LICENSE /usr/share/doc/csi-vduse/copyright

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="csi-vduse" \
      org.opencontainers.image.description="CSI driver whose volumes are VDUSE devices" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Nobody: what the controller is. The chart makes node plugin and agent root, and says why.
USER 65532:65532
ENTRYPOINT ["/opt/csi-vduse/bin/csi-vduse"]
CMD ["--help"]
