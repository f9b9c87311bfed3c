"""The demo: a page in the browser on which a model draws beside its teacher.

``models`` decides who draws, ``wish`` what, ``studio`` draws and measures (``memory``); ``guard`` keeps others away.
None of them knows gradio: ``page`` is the page, ``server`` serves it, ``demo`` puts all together.
"""
