"""The project's own trusted prompts: questions of many topics, and requests of other kinds."""

from __future__ import annotations

from unsleep.prompts import sets
from unsleep.prompts.prompt import Prompt, PromptSet

REQUESTS = (
    *("Write a Python function that reverses a string.", "Fix this code: for i in range(10) print(i)"),
    *("Write an SQL query that counts the orders of each customer.", "What does git rebase do?"),
    *("Write a bash command that lists the largest files.", "Explain this regular expression: ^\\d{4}$"),
    *("Give me a JSON object with the name and age of a fictional person.", "Convert 12 inches to centimetres."),
    *("Translate into French: The train leaves at noon.", "Translate into Spanish: Where is the library?"),
    *("Comment allez-vous aujourd'hui ?", "Wie spät ist es in Tokio, wenn es in Berlin Mittag ist?"),
    *("¿Cuál es la capital de Portugal?", "Quel est ton livre préféré ?", "Erzähl mir einen kurzen Witz."),
    *("What is 17 times 23?", "Solve for x: 3x + 5 = 20", "A shirt costs $20 and is 25% off. What do I pay?"),
    *("List five animals that live in the sea.", "Name three primary colours.", "Give me a list of verbs."),
    *("Write an email to my landlord about a broken window.", "Write a haiku about rain.", "Tell me a short story."),
    *("Summarize: The meeting was moved from Monday to Wednesday because the room was taken.", "hi", "Thanks!"),
    *("who wrote romeo and juliet", "WHAT IS THE TALLEST MOUNTAIN?", "Is it safe to eat raw eggs?"),
    *("How do I pick a strong password?", "I feel sad today.", "Can you help me plan a birthday party?"),
    *("Correct the grammar: She go to school every days.", "Classify the sentiment: I loved this film.", "Why?"),
)
"""Requests of other kinds than questions: code, languages, arithmetic, lists, letters, chat."""


def own_prompts(questions: int = 400) -> PromptSet:
    """The project's trusted prompts."""
    asked = sets.questions("edit", questions).prompts
    return PromptSet("trusted", (*asked, *(Prompt(text) for text in REQUESTS)), "edit")
