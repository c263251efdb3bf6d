"""From config.json and a GPU to a plan with predicted memory and time. No torch at import."""
