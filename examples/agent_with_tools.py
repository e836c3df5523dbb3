"""An agent with tools under a header that changes each turn: its history is reused all the same.

    python -m sglang.launch_server --model-path MODEL --kvshare --kvshare-default auto
    python examples/agent_with_tools.py --url http://127.0.0.1:30000

The state stands in front, as many agents have it, so no prefix survives a turn. The model says why
a tool is called; which one comes next is a fixed plan, so that the example runs with any model.
"""

import argparse

import sglang as sgl

STOCK = {"tea": 14, "coffee": 3, "sugar": 40}
PRICES = {"tea": 4.50, "coffee": 7.20, "sugar": 1.10}


def list_items():
    return "\n".join(f"- {name} is kept on shelf {i}, packed by {10 + i}, counted every Friday"
                     for i, name in enumerate(STOCK, start=1))  # fmt: skip


def look_up(item):
    return (
        f"{STOCK[item]} packs of {item} are left. A pack costs {PRICES[item]:.2f}. It is ordered "
        f"when fewer than ten packs are left, and comes on the next working day before eight."
    )


def order(item, packs):
    return f"Ordered {packs} packs of {item} for {packs * PRICES[item]:.2f}; due tomorrow at eight."


PLAN = ((list_items,), (look_up, "coffee"), (look_up, "tea"), (order, "coffee", 20))


@sgl.function
def turn(s, state, history, call):
    s += f"Turn {state['turn']}, spent so far {state['spent']:.2f}.\n"
    s += "You keep the stock of a small shop with the tools list_items, look_up and order.\n"
    s += history
    s += f"Next call: {call}\nWhy:" + sgl.gen("why", max_tokens=12, stop="\n", temperature=0)


def reuse(meta):
    """What became of the prompt's tokens, as the server tells it with each answer."""
    record = meta["kvshare"][0]
    kinds = ("exact", "blended", "copied", "recomputed", "fresh")
    return ", ".join(f"{kind} {record[kind + '_tokens']}" for kind in kinds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of a running server")
    args = parser.parse_args()
    sgl.set_default_backend(sgl.RuntimeEndpoint(args.url))
    history, state = "", {"turn": 1, "spent": 0.0}
    for tool, *given in PLAN:
        call = f"{tool.__name__}({', '.join(map(str, given))})"
        said = turn.run(state, history, call)
        result = tool(*given)
        print(f"\n{call}\n  why:{said['why']}\n  [{reuse(said.get_meta_info('why'))}]\n{result}")
        history += f"Call: {call}\nWhy:{said['why']}\nResult: {result}\n\n"
        state["turn"] += 1
        if tool is order:
            state["spent"] += given[1] * PRICES[given[0]]


if __name__ == "__main__":
    main()
