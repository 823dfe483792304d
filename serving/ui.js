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

  // Enter sends nothing while an answer comes, or is asked for already: the text stays.
  const answering = () => document.querySelector("#message .stop-button") !== null;
  let asked = -Infinity; // when, until the answer begins
  new MutationObserver(() => { if (answering()) asked = -Infinity; })
    .observe(document.body, {childList: true, subtree: true});
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    if (!event.target.closest?.("#message") || !event.target.value?.trim()) return;
    if (answering() || performance.now() - asked < 5000) {
      event.preventDefault();
      event.stopImmediatePropagation();
    } else {
      asked = performance.now();
    }
  }, true);

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
