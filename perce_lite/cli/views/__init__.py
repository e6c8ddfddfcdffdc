"""What a person sees: tables, sections and pages."""
