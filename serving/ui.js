// Runs once, when the page is there.
() => {
  // The direction of each block is that of its own first letters; code is left to right. Only the
  // outermost blocks get a dir: "auto" does not look into what has one of its own.
  const setDirection = () => {
    for (const code of document.querySelectorAll("#chat :is(pre, code):not([dir])")) code.dir = "ltr";
    for (const block of document.querySelectorAll("#chat .prose > :not([dir])")) block.dir = "auto";
    for (const box of document.querySelectorAll("textarea:not([dir=auto])")) box.dir = "auto";
  };
  setDirection();
  new MutationObserver(setDirection).observe(document.body, {
    childList: true, subtree: true, attributes: true, attributeFilter: ["dir"],
  });

  // On a phone the settings would cover everything.
  if (window.innerWidth < 768) document.querySelector(".sidebar.open .toggle-button")?.click();

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
