"""A person's writing becomes rows: text, Markdown, CSV, mail, chats, ZIP files."""
