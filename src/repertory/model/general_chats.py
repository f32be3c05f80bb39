"""A few everyday exchanges, written for this purpose, on which no voice should lose its wits.

Scored before and after training: the certificate bounds how much worse a voice may predict them than its base.
"""

from __future__ import annotations

from repertory.data.conversations import Conversation, Message

_EXCHANGES = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("Can you name three fruits?", "Apples, bananas and oranges are three fruits."),
    ("What do plants need to grow?", "Plants need light, water, air and nutrients from the soil."),
    ("Thank you for your help!", "You're welcome! Let me know if there is anything else."),
    ("Why is the sky blue?", "Because the air scatters blue light from the sun more than red light."),
    ("How do I boil an egg?", "Put it into boiling water for about eight minutes, then cool it in cold water."),
    ("What is two plus two?", "Two plus two is four."),
    ("Give me a tip for sleeping better.", "Go to bed at the same time every day and keep the room dark and cool."),
    ("What is a library?", "A library is a place where you can read and borrow books."),
    ("I feel a bit sad today.", "I'm sorry to hear that. Do you want to talk about what happened?"),
    ("What should I wear when it rains?", "A rain coat and boots will keep you dry, and an umbrella helps too."),
]


def general_chats() -> list[Conversation]:
    return [
        Conversation(messages=[Message(role="user", content=asked), Message(role="assistant", content=answered)])
        for asked, answered in _EXCHANGES
    ]
