"""Colours, type and corners of the page. CSS takes the same values through the variables named here."""

from __future__ import annotations

import gradio as gr

LIGHT = {
    "bg": "#faf9f6", "panel": "#ffffff", "line": "#e6e2d9", "ink": "#23211c", "soft": "#6a6559", "accent": "#b4532a",
    "accent-ink": "#ffffff", "accent-soft": "#f6e7df", "good": "#3a7548", "warn": "#96590a", "bad": "#a8322b",
    "bad-soft": "#fbeae7", "bar": "#d9d3c6", "code": "#f4f1ea",
}  # fmt: skip
DARK = {
    "bg": "#171613", "panel": "#1f1e1a", "line": "#34322b", "ink": "#ece8de", "soft": "#a39d8f", "accent": "#e08a5e",
    "accent-ink": "#1b120c", "accent-soft": "#3a2a20", "good": "#7fbf8e", "warn": "#d9a452", "bad": "#f0958b",
    "bad-soft": "#3a211e", "bar": "#3a3730", "code": "#26241f",
}  # fmt: skip
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def variables() -> str:
    """The palette as CSS variables, `--suri-bg` and so on, for both modes."""
    light = "".join(f"--suri-{name}:{value};" for name, value in LIGHT.items())
    dark = "".join(f"--suri-{name}:{value};" for name, value in DARK.items())
    return f":root{{{light}color-scheme:light}}\n:root.dark,body.dark,.dark{{{dark}color-scheme:dark}}\n"


def theme() -> gr.themes.Base:
    """Gradio's own widgets in our colours. Only fonts that the reader's system has: nothing is fetched."""

    def both(**names: str) -> dict[str, str]:
        return {k: v for n, c in names.items() for k, v in ((n, f"var(--suri-{c})"), (f"{n}_dark", f"var(--suri-{c})"))}

    base = gr.themes.Base(
        primary_hue="orange", neutral_hue="stone", radius_size="md", spacing_size="md", text_size="md",
        font=FONT, font_mono=MONO,
    )  # fmt: skip
    return base.set(
        **both(
            body_background_fill="bg", body_text_color="ink", body_text_color_subdued="soft",
            background_fill_primary="panel", background_fill_secondary="bg", border_color_primary="line",
            border_color_accent="accent", color_accent_soft="accent-soft", block_background_fill="panel",
            block_border_color="line", block_label_text_color="soft", block_title_text_color="ink",
            block_info_text_color="soft", input_background_fill="panel", input_border_color="line",
            input_border_color_focus="accent", input_placeholder_color="soft", link_text_color="accent",
            link_text_color_hover="accent", button_primary_background_fill="accent",
            button_primary_background_fill_hover="accent", button_primary_text_color="accent-ink",
            button_primary_text_color_hover="accent-ink", button_primary_border_color="accent",
            button_secondary_background_fill="panel", button_secondary_background_fill_hover="accent-soft",
            button_secondary_text_color="ink", button_secondary_text_color_hover="ink",
            button_secondary_border_color="line", slider_color="accent", code_background_fill="code",
        ),
        color_accent="var(--suri-accent)", block_shadow="none", block_shadow_dark="none", input_shadow="none",
        input_shadow_focus="none", input_border_width="1px", button_primary_shadow="none",
        button_secondary_shadow="none",
        button_border_width="1px", block_border_width="0px", block_border_width_dark="0px", block_padding="0",
        button_large_radius="10px", button_small_radius="10px", input_radius="10px", block_radius="10px",
        block_info_text_size="13.5px", block_title_text_weight="550", button_large_text_weight="550",
    )  # fmt: skip
