async () => {
  // The id of this browser tab: kept over a reload, not shared with other windows. A duplicated tab copies the store of
  // the original, so whoever finds that the id is in use takes a new one.
  const random = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
  let id = null;
  try { id = sessionStorage.getItem("suri-tab"); } catch (error) { /* storage is switched off: the chat lives until a reload */ }
  const channel = "BroadcastChannel" in window ? new BroadcastChannel("suri-tabs") : null;
  if (id && channel) {
    const taken = await new Promise((resolve) => {
      const timer = setTimeout(() => resolve(false), 60);
      channel.onmessage = (event) => {
        if (event.data && event.data.mine === id) { clearTimeout(timer); resolve(true); }
      };
      channel.postMessage({ whose: id });
    });
    if (taken) id = null;
  }
  id = id || random();
  try { sessionStorage.setItem("suri-tab", id); } catch (error) { /* as above */ }
  if (channel) channel.onmessage = (event) => { if (event.data && event.data.whose === id) channel.postMessage({ mine: id }); };
  return [id];
}
