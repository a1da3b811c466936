"""The interfaces of the kubelet, as messages: made from the .proto files beside it, which say how."""
