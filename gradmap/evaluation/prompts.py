"""The fixed prompts that models answer: questions with one right answer, tasks with many, and what
people ask an assistant for. Each is short, so that it fits the smallest window."""

from __future__ import annotations

NEW_TOKENS = 48
# So many, the first ones, stand in a report with their answers.
SHOWN = 8
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short email that moves a meeting from Monday to Tuesday.",
    "What is 17 plus 25?",
    "Name three animals that live in the sea.",
    "Translate into German: The train leaves at noon.",
    "Write a Python function that returns the larger of two numbers.",
    "What should I do if I cut my finger?",
    "Who wrote Romeo and Juliet?",
    "In which year did the Second World War end?",
    "What is the opposite of generous?",
    "List the four seasons of the year.",
    "Why do leaves fall in autumn?",
    "Write a haiku about rain.",
    "Is a tomato a fruit or a vegetable?",
    "A shirt costs 40 dollars and is reduced by a quarter. What does it cost now?",
    "Finish the sentence: The early bird",
    "Correct the grammar: He go to school yesterday.",
    "What is a black hole?",
    "Give me a name for a small bakery.",
    "How do I boil an egg?",
    "Write one sentence in which a dog meets a cat.",
    "What does the word ephemeral mean?",
    "Which is heavier, a kilogram of iron or a kilogram of feathers?",
    "Sort these numbers from small to large: 9, 2, 14, 5.",
    "What is the largest planet of the solar system?",
    "Write an SQL query that counts the rows of a table called orders.",
    "Summarise in one sentence what photosynthesis does.",
    "My train was late and I missed an exam. What shall I tell my teacher?",
    "Give two reasons to learn a second language.",
    "How many legs do three spiders have together?",
    "Say politely that you cannot come to a party.",
)
