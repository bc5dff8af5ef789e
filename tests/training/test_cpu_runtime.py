"""Without a GPU, torch's calls that name CUDA answer for the CPU, and no other call is asked."""

from in_process import call


def answers() -> dict:
    """Devices of what is made "on CUDA" in a process that the CPU runtime has changed."""
    import torch

    x = torch.ones(2, requires_grad=True)
    made = {
        "empty": torch.empty(2, device="cuda"),
        "tensor": torch.tensor([1.0], device="cuda:1"),
        "pinned": torch.zeros(2, pin_memory=True),
        "zeros_like": torch.zeros_like(x, device=torch.device("cuda")),
        "new_empty": x.new_empty(2, device="cuda"),
        "to": x.to("cuda"),
        "to by keyword": x.to(device="cuda", dtype=torch.float64),
        "cuda": x.cuda(),
        "pin_memory": x.pin_memory(),
        "module": torch.nn.Linear(2, 2).to("cuda").weight,
    }
    return {
        "devices": {name: str(tensor.device) for name, tensor in made.items()},
        "same": made["cuda"] is x and made["pin_memory"] is x,
        "types": [x.type(), x.type(torch.float64).dtype == torch.float64],
        "asked in every call": torch._C._len_torch_function_stack(),
    }


def test_cuda_means_the_cpu_without_a_say_in_every_call():
    found = call("test_cpu_runtime", "answers")
    assert set(found["devices"].values()) == {"cpu"}, found["devices"]
    assert found["same"] and found["types"] == ["torch.cuda.FloatTensor", True]
    assert found["asked in every call"] == 0
