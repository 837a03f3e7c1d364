// What Gradio has no words for: shortcuts, staying at the end of a growing chat, light or dark, spoken status.
// Everything is delegated from the document, because tabs appear late. Model output never reaches this file.
(() => {
  "use strict";
  const find = (selector) => document.querySelector(selector);
  const seen = (element) => !!element && element.offsetParent !== null;
  const press = (selector) => { const button = find(selector); if (seen(button)) { button.click(); return true; } return false; };
  const finePointer = () => matchMedia("(pointer: fine)").matches;
  const typing = (element) => !!element && (element.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(element.tagName));
  const busy = () => !!find('#chat-state [data-busy="1"]');
  const focusBox = () => { const box = find("#box textarea"); if (seen(box)) box.focus(); };

  // light or dark: the system decides until the person does
  const remembered = () => { try { return localStorage.getItem("suri-theme"); } catch (error) { return null; } };
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => { const choice = remembered(); return choice ? choice === "dark" : systemDark.matches; };
  const paint = () => {
    document.documentElement.classList.toggle("dark", dark());
    if (document.body && document.body.classList.contains("dark") !== dark()) document.body.classList.toggle("dark", dark());
  };
  const turnTheme = () => {
    const next = dark() ? "light" : "dark";
    try { localStorage.setItem("suri-theme", next); } catch (error) { /* not kept, then */ }
    paint();
  };

  // the list of shortcuts
  const KEYS = [["Enter", "Send"], ["Shift+Enter", "New line"], ["Esc", "Stop the reply"], ["Alt+N", "New chat"],
    ["Alt+↑", "Edit your last message"], ["?", "This list"]];
  const showKeys = () => {
    let dialog = find("#keys");
    if (!dialog) {
      dialog = document.createElement("dialog");
      dialog.id = "keys";
      dialog.setAttribute("aria-labelledby", "keys-title");
      const rows = KEYS.map(([key, what]) => `<dt>${key}</dt><dd>${what}</dd>`).join("");
      dialog.innerHTML = `<h2 id="keys-title">Keyboard</h2><dl>${rows}</dl><form method="dialog"><button>Close</button></form>`;
      document.body.append(dialog);
    }
    if (!dialog.open) dialog.showModal();
  };

  const editLast = () => {
    const buttons = document.querySelectorAll('#messages button[aria-label="Edit"]');
    if (!buttons.length || busy()) return;
    buttons[buttons.length - 1].click();
    setTimeout(() => { const area = find("#messages textarea"); if (area) { area.focus(); area.select(); } }, 60);
  };
  const newChat = () => {
    if (!seen(find("#chat"))) press("#tab-chat-button");
    press("#new-chat");
    setTimeout(focusBox, 60);
  };

  document.addEventListener("keydown", (event) => {
    if (find("#keys[open]") || event.isComposing) return;
    const plain = !event.altKey && !event.ctrlKey && !event.metaKey;
    if (event.key === "Enter" && busy() && event.target.closest && event.target.closest("#box") && !event.shiftKey) {
      event.preventDefault(); // the reply is still being written; what is typed stays
      event.stopPropagation();
    } else if (event.key === "Enter" && plain && !event.shiftKey && event.target.closest && event.target.closest("#messages textarea")) {
      event.preventDefault();
      press('#messages button[aria-label="Submit"]');
      setTimeout(focusBox, 0);
    } else if (event.key === "Escape" && plain) {
      if (press("#stop") || press("#completion-stop")) event.preventDefault();
      else if (event.target.closest && event.target.closest("#messages")) {
        press('#messages button[aria-label="Cancel"]');
        setTimeout(focusBox, 0);
      }
    } else if (event.altKey && event.code === "KeyN") {
      event.preventDefault();
      newChat();
    } else if (event.altKey && event.key === "ArrowUp" && seen(find("#chat"))) {
      event.preventDefault();
      editLast();
    } else if (event.key === "?" && plain && !typing(event.target)) {
      event.preventDefault();
      showKeys();
    }
  }, true);

  document.addEventListener("click", (event) => {
    const target = event.target.closest ? event.target : null;
    if (!target) return;
    const go = target.closest("[data-go]");
    if (go) press(`#tab-${go.dataset.go.toLowerCase()}-button`);
    const tool = target.closest("[data-tool]");
    if (tool) (tool.dataset.tool === "theme" ? turnTheme : showKeys)();
    if (target.closest("#system-toggle")) toggleSystem();
    if (target.closest("#send, #regenerate, .example, #new-chat") && finePointer()) setTimeout(focusBox, 0);
    if (target.closest("#new-chat") && !seen(find("#chat"))) press("#tab-chat-button");
  });

  const toggleSystem = (open) => {
    const card = find("#composer-card");
    const shown = card.classList.toggle("with-system", open);
    find("#system-toggle").setAttribute("aria-expanded", String(shown));
    if (shown && open === undefined) setTimeout(() => find("#system textarea").focus(), 0);
  };

  // the state line steers what is shown: copied to the tab's own element, and only when it changes
  const steer = (page, values) => {
    if (!page) return;
    for (const [name, value] of Object.entries(values)) if (value !== undefined && page.dataset[name] !== value) page.dataset[name] = value;
  };
  const steerChat = () => {
    const state = find("#chat-state .state");
    const versions = find("#versions .versions");
    if (state) steer(find("#chat"), { busy: state.dataset.busy, empty: state.dataset.empty });
    if (versions) steer(find("#chat"), { versions: versions.dataset.count === "1" ? "0" : "1" });
  };
  const steerCompletion = () => {
    const state = find("#completion-state .state");
    if (state) steer(find("#completion"), { busy: state.dataset.busy });
  };

  // staying at the end while a reply grows, unless the person has scrolled away
  const follow = (thread) => {
    let stick = true;
    let wasBusy = false;
    let planned = false;
    let top = 0;
    let height = 0;
    thread.addEventListener("scroll", () => {
      // away from the end by the person's hand: upwards, and not because what was below has become shorter or taller
      if (thread.scrollHeight - thread.scrollTop - thread.clientHeight < 80) stick = true;
      else if (thread.scrollTop < top && thread.scrollHeight === height) stick = false;
      top = thread.scrollTop;
      height = thread.scrollHeight;
    }, { passive: true });
    const settle = () => {
      planned = false;
      if (busy() && !wasBusy) stick = true;
      wasBusy = busy();
      if (stick) thread.scrollTop = thread.scrollHeight;
      speak();
    };
    const plan = () => { steerChat(); if (!planned) { planned = true; requestAnimationFrame(settle); } };
    new MutationObserver(plan).observe(thread, { childList: true, subtree: true, characterData: true });
    const sizes = new ResizeObserver(plan); // a turn that comes into sight gets its real height only then
    for (const part of [thread, find("#messages"), find("#live")]) if (part) sizes.observe(part);
    plan();
  };

  // the status in words for people who listen: when it changes its meaning, not at every number
  let spoken = "";
  const speak = () => {
    const words = find("#chat-state .words");
    const said = busy() ? (words ? words.textContent : "") : spoken ? "Reply finished" : "";
    const gist = said.replace(/, \d+%$/, "");
    if (gist === spoken.replace(/, \d+%$/, "")) return;
    spoken = gist === "Reply finished" ? "" : said;
    find("#announcer").textContent = said;
  };

  const label = (selector, text) => { const button = find(selector); if (button) button.setAttribute("aria-label", text); };
  const ready = () => {
    const thread = find("#thread");
    const parts = ["#box textarea", "#system-toggle", "#chat-state .state", "#tab-presets-button", "#older", "#new-chat"];
    if (!thread || !parts.every(find)) { setTimeout(ready, 50); return; } // Gradio mounts piece by piece
    const announcer = document.createElement("div");
    announcer.id = "announcer";
    announcer.className = "unseen";
    announcer.setAttribute("role", "status");
    announcer.setAttribute("aria-live", "polite");
    document.body.append(announcer);
    label("#older", "Earlier version");
    label("#newer", "Later version");
    label("#new-chat", "New chat");
    find("#system-toggle").setAttribute("aria-expanded", "false");
    follow(thread);
    new MutationObserver(steerCompletion).observe(find("#tabs"), { childList: true, subtree: true });
    document.body.dataset.ready = "1";
  };

  paint();
  systemDark.addEventListener("change", paint);
  const start = () => {
    const viewport = find("meta[name=viewport]");
    if (viewport) viewport.content = "width=device-width, initial-scale=1, interactive-widget=resizes-content";
    paint();
    new MutationObserver(paint).observe(document.body, { attributes: true, attributeFilter: ["class"] });
    ready();
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start(); // Gradio adds this script after the page has been parsed
})();
