"""A trainer that knows vLLM's server and nothing of this library: TRL's client gets one URL, with the key in it.

`GRPOTrainer` takes the same URL, and updates the server's weights over NCCL, for which the two need a GPU each:

    GRPOConfig(use_vllm=True, vllm_mode="server", vllm_server_base_url=llm.url_with_key, …)

    pip install trl
    python examples/08_trl.py
"""

from trl.generation.vllm_client import VLLMClient

from managed_vllm import ManagedVLLM

with ManagedVLLM(model="demo", for_training=True, keep_alive=30) as llm:
    client = VLLMClient(base_url=llm.url_with_key)
    print(f"model: {client.model}, processes that weights go to: {client.get_world_size()}")
    sampled = client.generate(["Screen:", "Task:"], n=2, max_tokens=8)
    for ids, logprobs in zip(sampled["completion_ids"], sampled["logprobs"], strict=True):
        print(f"{len(ids)} tokens, the first with logprob {logprobs[0][0]:.2f}")
    answered = client.chat([[{"role": "user", "content": "Which button is it?"}]], max_tokens=8, temperature=0.0)
    print(f"chat: {len(answered['completion_ids'][0])} tokens")
    client.reset_prefix_cache()
