"""A RAG service with the OpenAI client: retrieved passages come in another order, and are reused.

python -m sglang.launch_server --model-path MODEL --kvshare --kvshare-default auto
python examples/rag_service.py --url http://127.0.0.1:30000 [--question "..."]
"""

import argparse

import openai

PASSAGES = (
    "Books may be returned within 30 days of purchase if the spine is not broken and the receipt "
    "is shown at the desk. A book that was a gift is exchanged, not refunded.",
    "Gift cards, newspapers and opened audio books cannot be returned, but they can be exchanged "
    "within 7 days for something of the same price or more.",
    "Members of the reading club have 60 days to return a book and need no receipt, because "
    "purchases are stored on their card. Membership costs 12 euros a year.",
    "Refunds are paid the way the purchase was paid. Cash refunds above 50 euros need the "
    "signature of a manager, who is there from ten to four.",
    "Orders from abroad are sent with insurance and arrive within ten days. Customs are paid by "
    "the customer, and a return from abroad is paid by the shop.",
)
QUESTIONS = (
    "How many days do members of the club have to return a book, and is a receipt needed?",
    "Can gift cards be returned within 30 days, or can they only be exchanged?",
    "Who signs cash refunds above 50 euros, and is the receipt of the purchase needed?",
)


def retrieve(question, top=3):
    """The passages that share most words with the question, best first."""
    asked = set(question.lower().replace("?", "").replace(",", "").split())
    return sorted(PASSAGES, key=lambda text: -len(asked & set(text.lower().split())))[:top]


def ask(client, question):
    """The answer, and what of the prompt was in the cache."""
    passages = "\n\n".join(retrieve(question))
    reply = client.chat.completions.create(
        model="default",
        messages=[
            {"role": "system", "content": "Answer from the passages, in one sentence."},
            {"role": "user", "content": f"{passages}\n\nQuestion: {question}"},
        ],
        temperature=0,
        max_tokens=24,
    )
    record = reply.usage.model_extra["kvshare"][0]
    kinds = ("exact", "blended", "copied", "recomputed", "fresh")
    return reply.choices[0].message.content, {kind: record[f"{kind}_tokens"] for kind in kinds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of a running server")
    parser.add_argument("--question", action="append", help="may be given several times")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=f"{args.url}/v1", api_key="none")
    for question in args.question or QUESTIONS:
        answer, reuse = ask(client, question)
        print(f"\n{question}\n  {answer}")
        print("  [" + ", ".join(f"{kind} {count}" for kind, count in reuse.items()) + "]")


if __name__ == "__main__":
    main()
