"""An OpenAI endpoint whose models are a fleet's users, and a page to look at."""
