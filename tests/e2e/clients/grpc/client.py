"""grpcio with nothing but what reflection tells: services, descriptors, calls, deadline, cancellation."""

import json
import sys

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


def main() -> None:
    address, model, prompt, expected = sys.argv[1:5]
    channel = grpc.insecure_channel(address)
    grpc.channel_ready_future(channel).result(timeout=60)

    database = ProtoReflectionDescriptorDatabase(channel)
    services = database.get_services()
    assert "cadre.v1.Inference" in services and "grpc.health.v1.Health" in services, services

    pool = descriptor_pool.DescriptorPool(database)
    service = pool.FindServiceByName("cadre.v1.Inference")
    call = {method.name: stub(channel, method) for method in service.methods}
    assert {"Generate", "GenerateStream", "ListModels"} <= call.keys(), call.keys()
    request_type = message_factory.GetMessageClass(service.FindMethodByName("Generate").input_type)

    listed = call["ListModels"](message_factory.GetMessageClass(service.FindMethodByName("ListModels").input_type)())
    assert [entry.name for entry in listed.models] == [model], listed

    def request(**fields):
        asked = request_type(**fields)
        message = asked.chat.messages.add()
        message.role, message.content = "user", prompt
        asked.sampling.temperature = 0
        return asked

    answer = call["Generate"](request(), timeout=120)
    assert answer.text == expected, answer
    chunks = list(call["GenerateStream"](request(), timeout=120))
    assert "".join(chunk.text for chunk in chunks) == expected, chunks
    assert len(chunks) > 10, "the answer came in one piece"
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens, chunks[-1]

    compressed = call["Generate"](request(), timeout=120, compression=grpc.Compression.NoCompression)
    assert compressed.text == expected, compressed

    endless = {"max_tokens": 3000, "ignore_eos": True}
    assert code(lambda: call["Generate"](request(**endless), timeout=0.3)) is grpc.StatusCode.DEADLINE_EXCEEDED
    stream = call["GenerateStream"](request(**endless), timeout=120)
    next(stream)
    stream.cancel()
    assert code(lambda: list(stream)) is grpc.StatusCode.CANCELLED

    assert code(lambda: call["Generate"](request(model="gpt-4"))) is grpc.StatusCode.NOT_FOUND
    assert code(lambda: call["Generate"](request_type())) is grpc.StatusCode.INVALID_ARGUMENT
    assert code(lambda: call["Generate"](request(stop=["x" * (9 << 20)]))) is grpc.StatusCode.RESOURCE_EXHAUSTED

    health = pool.FindServiceByName("grpc.health.v1.Health").FindMethodByName("Check")
    state = stub(channel, health)(message_factory.GetMessageClass(health.input_type)(service="cadre.v1.Inference"))
    assert state.status == 1, state
    print(json.dumps({"grpcio": grpc.__version__, "checks": "passed"}))


def stub(channel: grpc.Channel, method):
    """A callable for a method that is known by its descriptor alone."""
    kind = channel.unary_stream if method.server_streaming else channel.unary_unary
    return kind(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )


def code(call) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    raise AssertionError("no error")


if __name__ == "__main__":
    main()
