// Runs once, when the page is there.
() => {
  // The direction of each block is that of its own text; code is left to right.
  const blocks = ["p", "li", "ul", "ol", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "table",
                  "td", "th"].map((name) => `#chat .message ${name}:not([dir])`).join();
  const mark = () => {
    document.querySelectorAll(blocks).forEach((one) => { one.dir = "auto"; });
    document.querySelectorAll("#chat :is(pre, code):not([dir])").forEach((one) => { one.dir = "ltr"; });
    document.querySelectorAll("textarea").forEach((one) => { if (one.dir !== "auto") one.dir = "auto"; });
  };
  mark();
  new MutationObserver(mark).observe(document.body, {
    childList: true, subtree: true, attributes: true, attributeFilter: ["dir"],
  });

  // A file of the conversation, made here: the server stores nothing.
  window.saveConversation = (kind, history, system) => {
    const text = (content) => typeof content === "string" ? content
      : content.map((part) => typeof part === "string" ? part : part.text ?? "").join("");
    const messages = (history ?? []).map(({role, content}) => ({role, content: text(content)}));
    if (system?.trim()) messages.unshift({role: "system", content: system});
    const whole = kind === "json"
      ? JSON.stringify({kind: "conversation", source: "serving.ui", messages}) + "\n"
      : messages.map(({role, content}) => `**${role}**\n\n${content}\n`).join("\n");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([whole], {type: "text/plain;charset=utf-8"}));
    link.download = `conversation.${kind}`;
    link.click();
    URL.revokeObjectURL(link.href);
  };
}
