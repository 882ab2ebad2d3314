"""The command khmer-ocr, a module for each group of verbs"""
