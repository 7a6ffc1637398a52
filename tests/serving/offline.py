"""Greedy tokens of prompts by vLLM's ``LLM``, and log-probabilities of the prompts' own tokens.

A program of its own, since vLLM starts processes.

python offline.py DIR '{"enforce_eager": true}' '[[1, 2, 3]]' TOKENS
"""

import json
import sys

from vllm import LLM, SamplingParams


def pairs_of(tokens: list, entries: list) -> list:
    """Pairs of two lists without the first, which has no log-probability."""
    return list(zip(tokens, entries, strict=True))[1:]


def main() -> None:
    folder, options, prompts, tokens = sys.argv[1:]
    llm = LLM(folder, **json.loads(options))
    inputs = [{"prompt_token_ids": ids} for ids in json.loads(prompts)]
    sampling = SamplingParams(temperature=0, max_tokens=int(tokens), prompt_logprobs=0)
    outputs = llm.generate(inputs, sampling)
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "log_probabilities": [
            [entry[token].logprob for token, entry in pairs_of(ids, output.prompt_logprobs)]
            for ids, output in zip(json.loads(prompts), outputs, strict=True)
        ],
    }
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
