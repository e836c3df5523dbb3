"""Shared documents in moved order: an SGLang program forks, and says what it reused.

python -m sglang.launch_server --model-path MODEL --kvshare --kvshare-default auto
python examples/fork_documents.py --url http://127.0.0.1:30000
"""

import argparse

import sglang as sgl

NOTES = {
    "Monday": "The team agreed to open the new branch in March. Ana asked for two more desks and a "
    "printer, and Ben will compare three offers before the end of the week. The landlord wants the "
    "deposit in January. Nobody objected, but Carla would like to see the heating repaired first.",
    "Tuesday": "The website lost forty orders during the night, because the payment service "
    "refused every card from abroad. Dora called the bank and was promised an answer by noon. "
    "Until then the shop shows a note above the basket and takes orders by telephone.",
    "Wednesday": "The reading club now has two hundred members. Emil proposed to meet twice a "
    "month and to lend books for sixty days. The insurance covers events of up to fifty guests, "
    "so larger ones need a form that Ana keeps in the blue folder.",
}
QUESTIONS = ("Who does what next?", "What could go wrong?", "Which dates matter?")


@sgl.function
def review(s, days):
    """One summary of all notes, then all questions about them at once."""
    s += "Read these notes of our meetings.\n\n"
    for day in days:
        s += f"Notes of {day}: {NOTES[day]}\n\n"
    s += "Summary in one sentence:" + sgl.gen("summary", max_tokens=16, stop="\n", temperature=0)
    asked = s.fork(len(QUESTIONS))
    for one, question in zip(asked, QUESTIONS, strict=True):
        one += f"\nQuestion: {question}\nAnswer:"
        one += sgl.gen("answer", max_tokens=12, stop="\n", temperature=0)
    asked.join()
    s["answers"] = [(one["answer"], one.get_meta_info("answer")) for one in asked]


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
    for days in (("Monday", "Tuesday", "Wednesday"), ("Wednesday", "Monday", "Tuesday")):
        state = review.run(days)
        print(f"\nnotes of {', '.join(days)}:{state['summary']}")
        print(f"  [{reuse(state.get_meta_info('summary'))}]")
        for question, (answer, meta) in zip(QUESTIONS, state["answers"], strict=True):
            print(f"  {question}{answer}\n  [{reuse(meta)}]")


if __name__ == "__main__":
    main()
