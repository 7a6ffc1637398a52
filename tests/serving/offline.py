"""Greedy tokens of prompts by vLLM's ``LLM``: a program of its own, since vLLM starts processes.

python offline.py DIR '{"enforce_eager": true}' '[[1, 2, 3]]' TOKENS
"""

import json
import sys

from vllm import LLM, SamplingParams


def main() -> None:
    folder, options, prompts, tokens = sys.argv[1:]
    llm = LLM(folder, **json.loads(options))
    inputs = [{"prompt_token_ids": ids} for ids in json.loads(prompts)]
    outputs = llm.generate(inputs, SamplingParams(temperature=0, max_tokens=int(tokens)))
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
