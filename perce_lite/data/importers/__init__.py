"""Mails, chats and notes become rows."""
