// Browsers refuse web workers to a page that is opened as a file. The search of this theme then runs in a hidden frame:
// it asks the page that holds it for `IFrameWorker`, and awaits `importScripts`.
if (location.protocol === "file:") {
  const start = (address) => `<body><script>
    postMessage = (data) => parent.postMessage(data, "*");
    importScripts = async (...addresses) => {
      for (const address of addresses) {
        await new Promise((resolve, reject) => {
          const script = Object.assign(document.createElement("script"), {src: address, onload: resolve, onerror: reject});
          document.body.append(script);
        });
      }
    };
  </script><script src="${address}"></script></body>`;

  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(address) {
      super();
      this.frame = Object.assign(document.createElement("iframe"), {hidden: true});
      document.body.append(this.frame);
      const page = this.frame.contentWindow;
      page.document.open();  // removes the handlers of the window, so `onload` is set after it
      page.document.write(start(address));
      page.document.close();
      this.loaded = new Promise((resolve) => { page.onload = resolve; });
      window.addEventListener("message", (event) => {
        if (event.source !== this.frame.contentWindow) return;
        const copy = new MessageEvent("message", {data: event.data});
        this.dispatchEvent(copy);
        if (this.onmessage) this.onmessage(copy);
      });
    }

    async postMessage(data) {
      await this.loaded;
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data}));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
