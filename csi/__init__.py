"""The CSI driver: a data set as a Kubernetes volume. Comes with the Kubernetes issue."""
