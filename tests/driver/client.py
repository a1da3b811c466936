"""A client of the driver, as the kubelet is one: made from the descriptors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from csi.v1 import csi_pb2, registration_pb2

TIMEOUT = 60.0
"""Seconds for an answer, on a machine that is busy with other things."""


class Client:
    """Calls over one socket."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def call(self, request: Message, *, timeout: float | None = TIMEOUT) -> Any:
        """The answer to `request`, whose type says which call it is. Raises grpc.RpcError."""
        for file in (csi_pb2.DESCRIPTOR, registration_pb2.DESCRIPTOR):
            if found := _method(file, request):
                path, reply = found
                call = self._channel.unary_unary(
                    path,
                    request_serializer=lambda message: message.SerializeToString(),
                    response_deserializer=GetMessageClass(reply).FromString,
                )
                return call(request, timeout=timeout, wait_for_ready=True)
        raise AssertionError(f"no call takes {request.DESCRIPTOR.name}")

    def code(self, request: Message) -> tuple[grpc.StatusCode, str]:
        """With which code and line `request` is refused; OK when it is not."""
        try:
            self.call(request)
        except grpc.RpcError as error:
            return error.code(), error.details()
        return grpc.StatusCode.OK, ""


def _method(file: FileDescriptor, request: Message) -> tuple[str, Any] | None:
    for service in file.services_by_name.values():
        for method in service.methods:
            if method.input_type is request.DESCRIPTOR:
                return f"/{service.full_name}/{method.name}", method.output_type
    return None


@contextmanager
def connected(path: object) -> Iterator[Client]:
    """A client of the socket at `path`."""
    with grpc.insecure_channel(f"unix:{path}") as channel:
        yield Client(channel)
